"""Which cases of each kind in `cases` are run: those of the tables, and small ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from .case import Case, Setting, Trial, tokens
from .cases import (
    backward,
    chunk,
    dense,
    n_of_m,
    overhead,
    skip,
    skip_unevenly,
    skip_with_hot_rows,
    tile_list,
    training,
)

RAGGED = (
    16384, 12288, 8192, 6144, 5120, 4096, 3333, 2777, 2222, 1600, 1111, 850, 600, 400, 250, 169,
)  # fmt: skip
"""16 sequences, 64k tokens."""


def standard_cases() -> list[Case]:
    """The table: bf16, 32 query heads, 8 KV heads, head_dim 128, causal, unless its name says otherwise."""
    k = 1024
    cases = [
        Case("dense", f"dense-{tokens(n)}", partial(dense, [n], beside_all=True))
        for n in (4 * k, 16 * k)
    ]
    cases += [Case("overhead", f"skip0-{tokens(n)}", partial(overhead, n)) for n in (4 * k, 16 * k)]
    cases += [
        Case("skip", f"skip{share}-16k", partial(skip, 16 * k, share / 100))
        for share in (50, 75, 90, 95)
    ]
    cases += [
        Case("skip", "skip10-90-16k", partial(skip_unevenly, 16 * k, 0.1, 0.9)),
        Case("skip", "skip-hot-rows-16k", partial(skip_with_hot_rows, 16 * k, 0.9)),
    ]
    cases += [
        Case("tiles", f"tiles{share}-16k", partial(tile_list, 16 * k, share / 100))
        for share in (50, 90)
    ]
    cases += [
        Case("nm", f"nm{n}:{m}-{tokens(length)}", partial(n_of_m, length, n, m))
        for n, m in ((2, 4), (4, 8))
        for length in (4 * k, 16 * k)
    ]
    cases += [Case("backward", "backward-8k", partial(backward, 8 * k))]
    cases += [
        Case("training", f"training{share}-8k", partial(training, 8 * k, share / 100))
        for share in (50, 75)
    ]
    for n in (2 * k, 8 * k, 32 * k, 64 * k, 128 * k):
        cases.append(Case("others", f"length-{tokens(n)}", partial(dense, [n])))
    for n in (8 * k, 64 * k, 128 * k):
        cases.append(Case("others", f"length-skip75-{tokens(n)}", partial(skip, n, 0.75)))
    for dim in (64, 256):
        for n in (4 * k, 16 * k):
            build = partial(_with_dim, dim, partial(dense, [n]))
            cases.append(Case("others", f"dim{dim}-{tokens(n)}", build))
        build = partial(_with_dim, dim, partial(skip, 16 * k, 0.75))
        cases.append(Case("others", f"dim{dim}-skip75-16k", build))
    build = partial(_with_dim, 192, partial(dense, [16 * k]), value_dim=128)
    cases.append(Case("others", "dims192-128-16k", build))
    cases.append(Case("others", "full-16k", partial(dense, [16 * k], causal=False)))
    cases.append(Case("others", "ragged-64k", partial(dense, RAGGED)))
    cases.append(Case("others", "equal-64k", partial(dense, [4 * k] * 16)))
    for share in (None, 0.75):
        name = "dense" if share is None else f"skip{share:.0%}".rstrip("%")
        build = partial(chunk, 2 * k, 32 * k, share)
        cases.append(Case("chunk", f"chunk-{name}-2k-of-32k", build))
    return cases


def smoke_cases() -> list[Case]:
    """Each kind of case, small."""
    return [
        Case("dense", "dense-200", partial(dense, [200])),
        Case("overhead", "skip0-200", partial(overhead, 200)),
        Case("skip", "skip50-1k", partial(skip, 1024, 0.5)),
        Case("skip", "skip10-60-1k", partial(skip_unevenly, 1024, 0.1, 0.6)),
        Case("skip", "skip-hot-rows-1k", partial(skip_with_hot_rows, 1024, 0.5)),
        Case("tiles", "tiles50-1k", partial(tile_list, 1024, 0.5)),
        Case("nm", "nm2:4-200", partial(n_of_m, 200, 2, 4)),
        Case("backward", "backward-200", partial(backward, 200)),
        Case("training", "training40-900", partial(training, 900, 0.4)),
        Case("others", "dim16-100", partial(_with_dim, 16, partial(dense, [100]))),
        Case(
            "others", "dims48-32-100", partial(_with_dim, 48, partial(dense, [100]), value_dim=32)
        ),
        Case("others", "full-200", partial(dense, [200], causal=False)),
        Case("others", "ragged-300", partial(dense, [150, 129, 20, 1])),
        Case("chunk", "chunk-dense-128-of-1k", partial(chunk, 128, 1024, None)),
        Case("chunk", "chunk-skip50-128-of-1k", partial(chunk, 128, 1024, 0.5)),
    ]


def _with_dim(
    dim: int, build: Callable[[Setting], Trial], setting: Setting, value_dim: int | None = None
) -> Trial:
    shape = replace(setting.shape, head_dim=dim, value_dim=value_dim)
    trial = build(replace(setting, shape=shape))
    return replace(trial, length=None)

"""Inputs with structure, so that tiles really are skipped, and the comparison with the oracle."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from modelopt_sparse.kernels.api import attention_triton, attention_varlen
from modelopt_sparse.kernels.types import AttentionOutput, Plan, ScoreGrid, Seqs
from tests.oracle import LOG2E, OracleOutput, as_array, oracle

EXACT_SCALE = math.log(2)  # times log2(e) it is exactly 1, so integer inputs have integer scores

needs_interpreter = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton's interpreter: TRITON_INTERPRET=1",
)


@dataclass
class Inputs:
    """Packed tensors and where their sequences lie. `exact`: scores carry no rounding."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    seqs: Seqs
    exact: bool = False

    @property
    def qkv(self):
        return self.q, self.k, self.v, self.seqs


def lay_out(q_lens, k_lens, gaps: bool) -> tuple[Seqs, int, int]:
    """Sequences end to end; with gaps, last one first and with rows in between that nobody owns."""
    if not gaps:
        return Seqs.from_lengths(q_lens, k_lens), sum(q_lens), sum(k_lens)

    def starts(lens):
        found, at = [0] * len(lens), 2
        for b in reversed(range(len(lens))):
            found[b] = at
            at += lens[b] + 3
        return found, at

    (q_start, rows), (k_start, keys) = starts(q_lens), starts(k_lens)
    columns = [torch.tensor(c, dtype=torch.int32) for c in (q_start, q_lens, k_start, k_lens)]
    return Seqs(*columns, max(q_lens, default=0), max(k_lens, default=0)), rows, keys


def _packed(q_lens, k_lens, heads, kv_heads, dim, dim_v, dtype, gaps):
    seqs, rows, keys = lay_out(list(q_lens), list(k_lens), gaps)
    q = torch.full((rows, heads, dim), math.nan, dtype=torch.float64)
    k = torch.full((keys, kv_heads, dim), math.nan, dtype=torch.float64)
    v = torch.full((keys, kv_heads, dim_v), math.nan, dtype=torch.float64)
    return seqs, q, k, v


def topical(
    q_lens, k_lens=None, *, heads=4, kv_heads=2, dim=16, dim_v=12, dtype=torch.float64, seed=0,
    span=16, strength=6.0, topics=3, gaps=True,
    grain=None,
) -> Inputs:  # fmt: skip
    """Keys and queries near a few directions, one direction for each `span` positions.

    A tile of another topic than the rows' lies about `strength` (natural log) below one of theirs.
    Queries and keys are multiples of `grain`, 1/8 unless float64: their dot products are then exact
    in float32, so that scores are equal or far apart, but not nearly equal.
    """
    k_lens = q_lens if k_lens is None else k_lens
    rng = np.random.default_rng(seed)
    seqs, q, k, v = _packed(q_lens, k_lens, heads, kv_heads, dim, dim_v, dtype, gaps)
    basis = np.linalg.qr(rng.standard_normal((dim, dim)))[0][:topics]
    size = math.sqrt(strength * math.sqrt(dim))

    def near_topics(n, count, offset, noise):
        choice = rng.integers(0, topics, size=((n + offset) // span + 1, count))
        at = choice[(np.arange(n) + offset) // span]  # [n, count]
        return size * basis[at] + noise * rng.standard_normal((n, count, dim))

    for b, (n_q, n_k) in enumerate(zip(q_lens, k_lens, strict=True)):
        q0, k0 = int(seqs.q_start[b]), int(seqs.k_start[b])
        offset = max(n_k - n_q, 0) % span
        q[q0 : q0 + n_q] = torch.from_numpy(near_topics(n_q, heads, offset, 0.3))
        k[k0 : k0 + n_k] = torch.from_numpy(near_topics(n_k, kv_heads, 0, 0.3))
        v[k0 : k0 + n_k] = torch.from_numpy(rng.standard_normal((n_k, kv_heads, dim_v)))
    if grain is None and dtype != torch.float64:
        grain = 1 / 8
    if grain is not None:
        q, k = (q / grain).round() * grain, (k / grain).round() * grain
    return Inputs(q.to(dtype), k.to(dtype), v.to(dtype), seqs)


def integers(
    q_lens, k_lens=None, *, heads=4, kv_heads=2, dim=4, dim_v=3, dtype=torch.float64, seed=0,
    span=16, gaps=True,
) -> Inputs:  # fmt: skip
    """Small integers, for use with `EXACT_SCALE`: scores are integers, full of ties.

    The first channel of k is a level that is constant over `span` keys, so whole tiles lie low.
    """
    k_lens = q_lens if k_lens is None else k_lens
    rng = np.random.default_rng(seed)
    seqs, q, k, v = _packed(q_lens, k_lens, heads, kv_heads, dim, dim_v, dtype, gaps)
    for b, (n_q, n_k) in enumerate(zip(q_lens, k_lens, strict=True)):
        q0, k0 = int(seqs.q_start[b]), int(seqs.k_start[b])
        queries = rng.integers(0, 2, size=(n_q, heads, dim))
        queries[..., 0] = 1
        keys = rng.integers(-1, 2, size=(n_k, kv_heads, dim))
        levels = rng.integers(-6, 3, size=(n_k // span + 1, kv_heads))
        keys[..., 0] = levels[np.arange(n_k) // span]
        q[q0 : q0 + n_q] = torch.from_numpy(queries).double()
        k[k0 : k0 + n_k] = torch.from_numpy(keys).double()
        v[k0 : k0 + n_k] = torch.from_numpy(rng.integers(-4, 5, (n_k, kv_heads, dim_v))).double()
    return Inputs(q.to(dtype), k.to(dtype), v.to(dtype), seqs, exact=True)


@dataclass
class Tolerance:
    """Bounds on rounding, from the unit roundoff of the arithmetic and the size of the inputs."""

    score: float
    weight: float
    value: float
    out_unit: float
    lse_unit: float
    product: float = 0.0

    @classmethod
    def of(cls, inputs: Inputs, scale=None, bias=None, rounds_weights=False) -> Tolerance:
        """`rounds_weights`: weights are rounded to the dtype of the values before the product."""
        q, k, v = (np.nan_to_num(as_array(t)) for t in (inputs.q, inputs.k, inputs.v))
        dtype = inputs.q.dtype
        unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
        dim, n_k = q.shape[-1], inputs.seqs.max_k
        scale = dim**-0.5 if scale is None else scale
        largest = np.abs(q).sum(-1).max(initial=0) * np.abs(k).max(initial=0) * abs(scale) * LOG2E
        if bias is not None:
            added = np.abs(as_array(bias.values))
            largest += added[np.isfinite(added)].max(initial=0) * LOG2E
        score = (dim + 8) * unit * largest  # dot product, scale, softcap, bias
        weight = 2 * math.log(2) * score + (n_k + 8) * unit  # numerator and denominator; the sums
        return cls(
            score,
            weight,
            np.abs(v).max(initial=0),
            torch.finfo(dtype).eps / 2,
            unit if dtype == torch.float64 else 2.0**-24,
            # Small weights are rounded to a multiple of the dtype's least number.
            (torch.finfo(dtype).eps + n_k * 2.0**-24 * (dtype == torch.float16)) * rounds_weights,
        )

    @property
    def decision(self) -> float:
        """Two scores, and log2(lambda) in fp32."""
        return 4 * self.score + 3e-6


def assert_close(actual, wanted, bound, what: str) -> None:
    actual, wanted = np.asarray(actual, dtype=np.float64), np.asarray(wanted)
    assert actual.shape == wanted.shape, f"{what}: shape {actual.shape}, not {wanted.shape}"
    same = actual == wanted  # infinities too
    with np.errstate(invalid="ignore"):
        far = ~same & ~(np.abs(actual - wanted) <= bound)
    assert not far.any(), (
        f"{what}: {far.sum()} of {far.size} differ, at {np.argwhere(far)[0].tolist()}: "
        f"{actual[far][0]} instead of {wanted[far][0]}"
    )


def assert_counts(actual, wanted, what: str) -> None:
    if wanted is None:
        assert actual is None, f"{what} counted although nothing skips there"
        return
    if actual is None:
        assert wanted.visible.sum() == 0, f"{what} not counted"
        return
    assert actual.visible.dtype == torch.int64 and actual.skipped.dtype == torch.int64
    assert actual.visible.tolist() == wanted.visible.tolist(), f"{what}: visible"
    assert actual.skipped.tolist() == wanted.skipped.tolist(), f"{what}: skipped"


def assert_kept(actual, wanted: list) -> None:
    if all(tiles is None for tiles in wanted) and actual is None:
        return
    assert actual is not None, "no kept tiles returned"
    assert len(actual) == len(wanted)
    for b, (got, tiles) in enumerate(zip(actual, wanted, strict=True)):
        if tiles is None:
            assert got is None, f"sequence {b}: kept tiles although nothing skips"
            continue
        assert got is not None and got.dtype == torch.bool
        assert got.shape == tiles.shape, f"sequence {b}: {tuple(got.shape)}, not {tiles.shape}"
        wrong = np.argwhere(got.numpy() != tiles)
        assert not len(wrong), f"sequence {b}: tiles (head, row, key) {wrong[:4].tolist()} differ"


def assert_matches(actual: AttentionOutput, wanted: OracleOutput, bound: Tolerance) -> None:
    """out, lse, dropped mass, its bound, kept tiles and counts are the oracle's."""
    assert_counts(actual.prefill, wanted.prefill, "prefill")
    assert_counts(actual.decode, wanted.decode, "decode")
    assert_kept(actual.kept, wanted.kept)
    out = as_array(actual.out)
    out_bound = bound.value * (2 * bound.weight + bound.product)
    out_bound = out_bound + bound.out_unit * np.abs(wanted.out)
    assert_close(out, wanted.out, out_bound, "out")
    lse_bound = 2 * bound.weight * LOG2E + bound.lse_unit * np.abs(wanted.lse)
    lse_bound = np.where(np.isfinite(lse_bound), lse_bound, 0)
    assert_close(as_array(actual.lse), wanted.lse, lse_bound, "lse")
    if actual.dropped_mass is not None:
        assert_close(as_array(actual.dropped_mass), wanted.dropped, 4 * bound.weight, "dropped")
    assert (actual.dropped_mass is None) == (actual.dropped_mass_bound is None)
    if actual.dropped_mass_bound is not None:
        most = as_array(actual.dropped_mass_bound)
        assert_close(most, wanted.bound, 4 * bound.weight, "dropped mass bound")


def check(
    inputs: Inputs, plan: Plan, entry=attention_varlen, **options
) -> tuple[AttentionOutput, OracleOutput]:
    """Runs `entry` and the oracle and compares everything."""
    if inputs.exact:
        options.setdefault("scale", EXACT_SCALE)
    wanted = oracle(*inputs.qkv, plan=plan, **options)
    bound = Tolerance.of(
        inputs, options.get("scale"), options.get("bias"), entry is attention_triton
    )
    if not inputs.exact:
        assert wanted.margin > bound.decision, "a tie within rounding: choose another seed"
        assert wanted.nm_margin > 4 * bound.score, "an N:M tie within rounding: choose another seed"
    actual = entry(*inputs.qkv, plan=plan, details=True, **options)
    assert actual.out.dtype == inputs.q.dtype
    assert_matches(actual, wanted, bound)
    return actual, wanted


def check_skips(inputs: Inputs, plan: Plan, phases=("prefill",), entry=attention_varlen, **options):
    """`check`, and tiles were skipped, tiles were kept, and the output shows it."""
    actual, wanted = check(inputs, plan, entry, **options)
    for phase in phases:
        counts = getattr(wanted, phase)
        assert 0 < counts.skipped[0].sum() < counts.visible.sum(), f"{phase}: {counts}"
    if inputs.exact:
        options.setdefault("scale", EXACT_SCALE)
    dense = entry(*inputs.qkv, plan=Plan(nm=plan.nm), **options)
    assert not torch.equal(actual.out, dense.out), "skipping changed nothing"
    assert wanted.dropped.max() > 0
    return actual, wanted


def features(names: str, inputs: Inputs, seed: int = 0) -> dict:
    """Options of `attention_varlen` by name, fitting the inputs: "window sinks" gives both."""
    rng = np.random.default_rng(seed)
    seqs, heads, dtype = inputs.seqs, inputs.q.shape[1], inputs.q.dtype
    batch = len(seqs.q_len)
    options: dict = {}

    def offsets():
        return torch.from_numpy(rng.integers(0, 4, batch)).int()

    def grid(fill, width, offset=True):
        row_start, key_start = (offsets(), offsets()) if offset else (None, None)
        values = fill((batch, width, seqs.max_q + 4, seqs.max_k + 4))
        return ScoreGrid(values, row_start, key_start)

    def holes(shape):
        return torch.from_numpy(rng.random(shape) < 0.7)

    def big_holes(shape):  # keys and rows in runs of 16, so that whole tiles are hidden
        rows, keys = -(-shape[2] // 16), -(-shape[3] // 16)
        coarse = torch.from_numpy(rng.random((*shape[:2], rows, keys)) < 0.6)
        fine = coarse.repeat_interleave(16, 2).repeat_interleave(16, 3)
        return fine[:, :, : shape[2], : shape[3]]

    def additive(shape):
        if inputs.exact and dtype != torch.float64:  # no multiple of ln 2 is exact there
            return torch.zeros(shape, dtype=dtype)
        if inputs.exact:  # log2(e) times these is an integer, exactly
            return torch.from_numpy(rng.integers(-1, 2, shape) * EXACT_SCALE).to(dtype)
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    def hiding(shape):
        return additive(shape).masked_fill(~holes(shape), -math.inf)

    def intervals():
        bounds = np.zeros((inputs.q.shape[0], 2), dtype=np.int32)
        for b in range(batch):
            q0, n_q, n_k = int(seqs.q_start[b]), int(seqs.q_len[b]), int(seqs.k_len[b])
            edges = np.sort(rng.integers(0, n_k + 1, (n_q, 2)), axis=1)
            bounds[q0 : q0 + n_q] = edges
        return torch.from_numpy(bounds)

    makers = {
        "full": lambda: {"causal": False},
        "window": lambda: {"window": 11},
        "wide_window": lambda: {"window": 45},
        "softcap": lambda: {"softcap": 8.0},
        "sinks": lambda: {"sinks": torch.from_numpy(rng.standard_normal(heads)).to(dtype)},
        "bounds": lambda: {"bounds": intervals()},
        "mask": lambda: {"mask": grid(holes, 1)},
        "head_mask": lambda: {"mask": grid(holes, heads)},
        "tile_mask": lambda: {"mask": grid(big_holes, heads, offset=False)},
        "bias": lambda: {"bias": grid(additive, 1)},
        "head_bias": lambda: {"bias": grid(hiding, heads)},
        "scale": lambda: {"scale": 0.4},
    }
    for name in names.split():
        options |= makers[name]()
    return options

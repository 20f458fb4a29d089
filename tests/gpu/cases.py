"""The cases of the pairwise tests: which levels meet, and by what names."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tests.paged import LAYOUTS
from tests.pairwise import Row, Rule, grouped_rows

# Lengths of the query rows and of the keys of each sequence.
SHAPES = {
    "single": ([389], [389]),
    "ragged": ([0, 130, 1, 517, 64, 0], [0, 130, 1, 517, 64, 40]),
    "chunk": ([70, 200, 16], [650, 333, 16]),
    "more_rows": ([300, 140, 9], [130, 40, 0]),
    "mixed": ([1, 260, 1, 33, 0], [700, 260, 45, 97, 12]),
    "one_row": ([1, 1, 3], [300, 5, 130]),  # a prefill, because the caller says so
    "decode": ([1, 1, 1, 1, 1, 1], [1, 63, 64, 0, 700, 8300]),
    "draft": ([4, 16, 2, 0, 7], [600, 16, 1, 80, 333]),  # several rows that decode
    "with_prefill": ([1, 150, 1, 1], [4200, 150, 77, 512]),
}
DTYPES = ("fp16", "bf16", "fp32")
HEADS = ((4, 4), (4, 2), (8, 1), (6, 2))
SIGHTS = ("causal", "full", "window", "bounds", "full_bounds")
STRIDES = ("contiguous", "heads_first", "padded", "odd", "overlap")

# What a compiler may see, and what should be an argument at run time.
PREFILL_VARIANT = {
    "dims": (
        (16, 16), (32, 32), (64, 64), (72, 72), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256),
        (192, 128), (64, 32),
    ),
    "nm": (None, (1, 4), (2, 4), (3, 4), (2, 8), (4, 8)),
    "skip": ("none", "on", "exact", "counts", "count_only", "given"),
    "blocks": ((64, 128), (16, 16), (128, 64), (32, 128), (64, 32)),
    "sight": SIGHTS,
    "strides": STRIDES,
    "heads": HEADS,
    "dtype": DTYPES,
    "mask": (False, True),
    "bias": (False, True),
    "softcap": (None, 20.0),
    "sinks": (False, True),
    "gradients": (False, True),
}  # fmt: skip
DECODE_VARIANT = {
    "dims": (
        (64, 64), (128, 128), (192, 128), (256, 256), (72, 72), (16, 16), (64, 32), (96, 96),
    ),
    "skip_decode": ("none", "on", "per_head", "exact", "counts"),
    "segments": ((64, 4096), (32, 128), (16, 64), (128, 256)),
    "sight": SIGHTS,
    "strides": STRIDES,
    "heads": HEADS,
    "dtype": DTYPES,
    "mask": (False, True),
    "bias": (False, True),
    "softcap": (None, 20.0),
    "sinks": (False, True),
}  # fmt: skip
RUN = {
    "inputs": ("topical", "integers", "normal"),
    "threshold": ("number", "heads", "sequences", "both"),
    "scale": ("default", "half", "negative"),
    "gaps": (True, False),
    "wide_grid": (True, False),
}
PREFILL_RUN = {
    "shape": ("single", "ragged", "chunk", "more_rows", "mixed", "one_row"),
    "shield": ((0, 64), (4, 17), (0, 0)),
    **RUN,
}
DECODE_RUN = {"shape": ("decode", "draft", "with_prefill"), **RUN}
# Keys in pages are laid out by these, and have no gradients.
PAGES = {"page": (1, 7, 16, 32, 64, 128), "layout": LAYOUTS}
PAGED_PREFILL_VARIANT, PAGED_DECODE_VARIANT = (
    {x: y for x, y in factors.items() if x not in ("strides", "gradients")} | PAGES
    for factors in (PREFILL_VARIANT, DECODE_VARIANT)
)
# What Hopper's prefill kernel takes. Keys lie in pages or in tensors of some strides.
HOPPER_VARIANT = {
    "dims": ((64, 64), (128, 128), (192, 128), (256, 256)),
    "skip": ("none", "on", "exact", "given"),
    "sight": ("causal", "full", "window"),
    "strides": ("contiguous", "heads_first", "padded"),
    "heads": HEADS,
    "dtype": ("fp16", "bf16"),
    "sinks": (False, True),
    "gradients": (False, True),
    "page": (0, 16, 32, 64, 128),
    "layout": LAYOUTS,
}
HOPPER_RULES = (
    Rule(("page", "gradients"), lambda page, wants: not (page and wants)),
    Rule(("page", "strides"), lambda page, strides: not page or strides == "contiguous"),
    Rule(("page", "layout"), lambda page, layout: page or layout == "nhd"),
    Rule(("gradients", "layout"), lambda wants, layout: not wants or layout == "nhd"),
    Rule(("strides", "layout"), lambda strides, layout: strides == "contiguous" or layout == "nhd"),
)
# Overlapping views have no gradient; they are one sequence's keys behind another's, without gaps.
PREFILL_RULES = (
    Rule(("strides", "gradients"), lambda strides, wants: strides != "overlap" or not wants),
)


@dataclass(frozen=True)
class Case:
    """One call. `group` numbers the variant: cases of a group differ in run-time arguments only."""

    group: int
    seed: int
    shape: str = "single"
    dtype: str = "fp16"
    dims: tuple[int, int] = (64, 64)
    heads: tuple[int, int] = (4, 2)
    sight: str = "causal"
    strides: str = "contiguous"
    mask: bool = False
    bias: bool = False
    wide_grid: bool = True
    softcap: float | None = None
    sinks: bool = False
    scale: str = "default"
    inputs: str = "topical"
    gaps: bool = False
    nm: tuple[int, int] | None = None
    shield: tuple[int, int] = (0, 64)
    skip: str = "none"
    blocks: tuple[int, int] = (64, 128)
    skip_decode: str = "none"
    segments: tuple[int, int] = (64, 4096)
    threshold: str = "number"
    gradients: bool = False
    page: int = 0
    layout: str = "nhd"

    @property
    def name(self) -> str:
        """Everything that is not the default."""
        d, dv = self.dims
        parts = [f"g{self.group:03}s{self.seed}", self.shape, self.dtype, f"{d}x{dv}"]
        parts.append(f"h{self.heads[0]}k{self.heads[1]}")
        if self.nm is not None:
            parts.append(f"{self.nm[0]}:{self.nm[1]}+{self.shield[0]}+{self.shield[1]}")
        if self.skip != "none":
            parts.append(f"skip={self.skip}({self.blocks[0]}x{self.blocks[1]})")
        if self.skip_decode != "none":
            parts.append(f"decode={self.skip_decode}({self.segments[0]}of{self.segments[1]})")
        said = {"group", "seed", "shape", "dtype", "dims", "heads", "nm", "shield"}
        said |= {"skip", "blocks", "skip_decode", "segments"}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name not in said and value != each.default:
                parts.append(each.name if value is True else f"{each.name}={value}")
        return "-".join(parts)


def _cases(groups: list[list[Row]], first: int) -> list[Case]:
    return [
        Case(group=first + g, seed=s, **row)
        for g, rows in enumerate(groups)
        for s, row in enumerate(rows)
    ]


def prefill_cases() -> list[Case]:
    """Sequences that prefill, alone and among some that decode densely."""
    groups = grouped_rows(
        PREFILL_VARIANT, PREFILL_RUN, PREFILL_RULES, per_group=5, total=450, seed=1
    )
    return _cases(groups, 0)


def decode_cases() -> list[Case]:
    """Sequences that decode, alone and among some that prefill densely."""
    groups = grouped_rows(DECODE_VARIANT, DECODE_RUN, per_group=4, total=160, seed=2)
    return _cases(groups, 500)


def paged_prefill_cases() -> list[Case]:
    """As `prefill_cases`, with keys in pages."""
    groups = grouped_rows(PAGED_PREFILL_VARIANT, PREFILL_RUN, per_group=4, total=240, seed=3)
    return _cases(groups, 700)


def paged_decode_cases() -> list[Case]:
    """As `decode_cases`, with keys in pages."""
    groups = grouped_rows(PAGED_DECODE_VARIANT, DECODE_RUN, per_group=4, total=160, seed=4)
    return _cases(groups, 900)


def hopper_cases() -> list[Case]:
    """Sequences that prefill, alone and among some that decode, by what Hopper's kernel takes."""
    groups = grouped_rows(HOPPER_VARIANT, PREFILL_RUN, HOPPER_RULES, per_group=5, total=200, seed=5)
    return _cases(groups, 1100)

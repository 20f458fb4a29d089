"""What a kernel is compiled for. Everything else is an argument of the call, so that it never recompiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """Compile-time constants of one kernel.

    Args:
        BLOCK_M, BLOCK_N: query rows and keys of a launch tile.
        HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV: channels, and the powers of two that hold them.
        PAGE: tokens of a page of keys and values; 0: these are packed.
        STAGES: tiles in flight.
        CAUSAL, HAS_BOUNDS: what limits rows.
        ONLY_EDGES: no tile is treated as fully visible, for none is known to be, or to have but one loop.
        HAS_LOWER_EDGE: some rows may not see the keys of the first tiles.
        BOXES: keys and values come by tensor descriptors, in tiles that all rows see. PIECES: boxes of a
            tile; two where a page is half a tile.
        HAS_MASK, HAS_BIAS, HAS_SOFTCAP, HAS_SINKS: what a call has.
        N, M: N:M sparsity; N = 0 is none.
        SKIP: row tiles decide which key tiles they skip. GIVEN: lists say so.
        GROUPS: row tiles in a program's rows.
        STORE_TILES: the decisions are stored, one bit each.
        LATE_VALUES: values are loaded only when a tile is kept.
        WEIGH_SKIPPED: the exponentials of skipped tiles are summed. EXACT: and join the normaliser.
        HISTOGRAM: tiles are counted by the lambda at which they fall.
        THRESHOLDS: how many further thresholds are counted, rounded up to a power of two; 0 is none.
        ONLY_PREFILL: sequences of one row are another launch's. ONLY_DECODE: all others are.
        PRECISION: of fp32 products: "ieee" or "tf32".
        UPCAST: queries are computed with in fp32 (Triton's interpreter has no bf16).
        KV_AS: the element type in which keys and values are computed with, if not their own.
    """

    BLOCK_M: int
    BLOCK_N: int
    HEAD_DIM: int
    HEAD_DIM_V: int
    BLOCK_D: int
    BLOCK_DV: int
    PAGE: int = 0
    STAGES: int = 2
    CAUSAL: bool = True
    HAS_BOUNDS: bool = False
    ONLY_EDGES: bool = False
    HAS_LOWER_EDGE: bool = False
    BOXES: bool = False
    PIECES: int = 1
    HAS_MASK: bool = False
    HAS_BIAS: bool = False
    HAS_SOFTCAP: bool = False
    HAS_SINKS: bool = False
    N: int = 0
    M: int = 4
    SKIP: bool = False
    GIVEN: bool = False
    GROUPS: int = 1
    STORE_TILES: bool = False
    LATE_VALUES: bool = False
    WEIGH_SKIPPED: bool = False
    EXACT: bool = False
    HISTOGRAM: bool = False
    THRESHOLDS: int = 0
    ONLY_PREFILL: bool = False
    ONLY_DECODE: bool = False
    PRECISION: str = "ieee"
    UPCAST: bool = False
    KV_AS: Any = None

    @property
    def HAS_GRIDS(self) -> bool:
        """Tensors say which keys a row sees."""
        return self.HAS_MASK or self.HAS_BIAS

    @property
    def IS_RAW(self) -> bool:
        """Scores stay products of q and k, to be scaled in the exponent."""
        return not (self.HAS_SOFTCAP or self.HAS_BIAS)

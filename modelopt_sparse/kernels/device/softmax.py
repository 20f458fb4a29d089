"""The online softmax: one step, and how it ends."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def rescale(running, tile_max):
    """The new running max, the pivot to subtract, and what the sums so far are multiplied with.

    Args:
        running, tile_max: [BLOCK_M] log2.
    """
    new = tl.maximum(running, tile_max)
    # A row that has seen nothing yet: -inf minus -inf must not become NaN.
    pivot = tl.where(new == float("-inf"), 0.0, new)
    return new, pivot, tl.exp2(running - pivot)


@triton.jit
def bound_of(raw_max, factor, running, N_KEYS: tl.constexpr):
    """A bound on the exponentials of a tile, by the largest score of each row; 0 where a row sees no key.

    Args:
        raw_max, running: [BLOCK_M]; raw_max * factor is the largest score, as log2.
    """
    # Said outright, for a product and a difference may be fused or not: the same bits in every launch.
    gap = tl.fma(raw_max, factor, -running)
    return tl.where(raw_max == float("-inf"), 0.0, N_KEYS * tl.exp2(gap))


@triton.jit
def finish(acc, total, running, lost, sink, v_scale, HAS_SINKS: tl.constexpr, EXACT: tl.constexpr):
    """Divides by the normaliser.

    Args:
        acc: [BLOCK_M, Dv]; total, running, lost: [BLOCK_M], sums of exponentials kept and skipped.
        sink: log2 sink logit of the head. v_scale: multiplies the output.
        EXACT: the normaliser counts what was skipped.
    Returns:
        out [BLOCK_M, Dv], lse [BLOCK_M] base 2, and [BLOCK_M] each: the kept sum with the sink, and the
        factor that brings other sums of exponentials to the same pivot.
    """
    # Not by `running`, which ignores scores that are NaN.
    empty = total == 0.0
    pivot = tl.where(empty, 0.0, running)
    factor = total * 0 + 1
    if HAS_SINKS:
        high = tl.maximum(pivot, sink)
        factor = tl.exp2(pivot - high)
        total = total * factor + tl.exp2(sink - high)
        acc = acc * factor[:, None]
        pivot = high
    whole = total + lost * factor if EXACT else total
    whole = tl.where(empty, 1.0, whole)
    out = tl.where(empty[:, None], 0.0, acc * (v_scale / whole)[:, None])
    lse = tl.where(empty, float("-inf"), tl.log2(whole) + pivot)
    return out, lse, total, factor

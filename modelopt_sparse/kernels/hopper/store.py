"""What the rows of a warpgroup come to, and where it goes."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .common import shrink
from .sizes import WARPS


class Targets(NamedTuple):
    """Where results go: pointers, strides, and what else they need.

    Args:
        sink: log2 logit of the head's sink. v_scale: factor of the output.
    """

    out: Any
    out_token: Any
    out_head: Any
    lse: Any
    counts: Any
    dropped_bound: Any
    dropped: Any
    head: Any
    n_heads: Any
    sink: Any
    v_scale: Any


class Tallies(NamedTuple):
    """Tiles that were visible, and skipped, and bits of decisions that aren't stored yet, the last lowest."""

    visible: Any
    skipped: Any
    pending: Any


@gluon.jit
def store(acc, state, tallies, row, is_row, targets, C: gl.constexpr):
    """Divides by the normaliser, and stores what rows come to, as `device.softmax.finish` does.

    Args:
        row: [64], where they lie in the packed tensors.
    """
    head, n_heads = targets.head, targets.n_heads
    total = state.total
    empty = total == 0.0
    pivot = gl.where(empty, 0.0, state.pivot)
    shrinks = total * 0 + 1
    if C.HAS_SINKS:
        high = gl.maximum(pivot, targets.sink)
        shrinks = gl.exp2(pivot - high)
        total = total * shrinks + gl.exp2(targets.sink - high)
        pivot = high
    whole = total
    if C.EXACT:
        whole = total + state.lost * shrinks
    whole = gl.where(empty, 1.0, whole)
    values = shrink(acc, gl.where(empty, 0.0, shrinks * targets.v_scale / whole))
    # Threads of a warp store rows as they lie, 16 bytes each.
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // C.HEAD_DIM_V, C.HEAD_DIM_V // 8], [WARPS, 1], [1, 0]
    )
    values = gl.convert_layout(values.to(targets.out.dtype.element_ty), layout)
    of_row: gl.constexpr = gl.SliceLayout(1, layout)
    token = gl.convert_layout(row, of_row).to(gl.int64)
    channel = gl.arange(0, C.HEAD_DIM_V, layout=gl.SliceLayout(0, layout))
    pointers = targets.out + head.to(gl.int64) * targets.out_head + token * targets.out_token
    gl.store(
        gl.expand_dims(pointers, 1) + gl.expand_dims(channel, 0),
        values,
        mask=gl.expand_dims(gl.convert_layout(is_row, of_row), 1),
    )
    entry = row.to(gl.int64) * n_heads + head
    row_lse = gl.where(empty, float("-inf"), gl.log2(whole) + pivot)
    gl.store(targets.lse + entry, row_lse, mask=is_row)
    if C.SKIP:
        gl.atomic_add(targets.counts + head, tallies.visible.to(gl.int64), sem="relaxed")
        gl.atomic_add(targets.counts + n_heads + head, tallies.skipped.to(gl.int64), sem="relaxed")
        bound = state.bound * shrinks
        share = gl.where(bound > 0, bound / (total + bound), 0.0)
        gl.store(targets.dropped_bound + entry, share, mask=is_row)
        if C.WEIGH_SKIPPED:
            lost = state.lost * shrinks
            share = gl.where(lost > 0, lost / (total + lost), 0.0)
            gl.store(targets.dropped + entry, share, mask=is_row)

"""The softmax of a warpgroup's rows, tile by tile, and what skipped tiles leave behind.

Source: FlashAttention-4's rescaling by need; skip rule: BLASST (arXiv 2512.12087).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .common import finite
from .sizes import KEYS
from .votes import any_row, any_row_of_warp

# Powers of two that weights may grow to before sums are rescaled.
_SLACK = gl.constexpr(8.0)
_LEAST_FLOAT = gl.constexpr(-3.4028234663852886e38)


class State(NamedTuple):
    """The softmax of each row so far, [64], in log2.

    Args:
        running: the largest score of kept tiles, -inf before the first.
        pivot: what weights are relative to: the running max, or no more than 8 below it.
        total: sum of the weights of kept tiles.
        bound, lost: at most what skipped tiles weigh, and what they do weigh, where that is asked for.
    """

    running: Any
    pivot: Any
    total: Any
    bound: Any
    lost: Any


@gluon.jit
def is_needed(tile_max, running, threshold, is_row, HALF: gl.constexpr):
    """Whether a row needs a key tile: the vote of `stages.skip.vote`, of one row tile."""
    limit = running + threshold
    needs = (tile_max < gl.where(limit > _LEAST_FLOAT, limit, _LEAST_FLOAT)) == 0
    return any_row(needs & is_row, HALF)


@gluon.jit
def weigh(score, raw_max, factor, state, C: gl.constexpr):
    """The softmax step of a kept tile.

    Where tiles are skipped, pivots follow running maxima only when these have run away: so few tiles rescale
    sums that waiting for the last product, to do so, isn't felt.

    Returns:
        weights [64, keys], the new state, and what sums shrink by.
    """
    tile_max = raw_max * factor
    pivot = gl.maximum(state.pivot, tile_max)
    if C.SKIP:
        pivot = gl.where(tile_max > state.pivot + _SLACK, tile_max, state.pivot)
    alpha = gl.exp2(state.pivot - finite(pivot))
    p = gl.exp2(score * factor - gl.expand_dims(finite(pivot), 1))
    total = gl.fma(state.total, alpha, gl.sum(p, 1))
    bound = state.bound
    lost = state.lost
    if C.SKIP:
        bound = bound * alpha
    if C.WEIGH_SKIPPED:
        lost = lost * alpha
    return p, State(gl.maximum(state.running, tile_max), pivot, total, bound, lost), alpha


@gluon.jit
def leave_out(score, raw_max, factor, state, C: gl.constexpr):
    """The state after a tile that is not kept."""
    bound = state.bound
    lost = state.lost
    if C.SKIP:
        most = KEYS * gl.exp2(gl.fma(raw_max, factor, -state.pivot))
        bound += gl.where(raw_max == float("-inf"), 0.0, most)
    if C.WEIGH_SKIPPED:
        lost += gl.sum(gl.exp2(score * factor - gl.expand_dims(finite(state.pivot), 1)), 1)
    return State(state.running, state.pivot, state.total, bound, lost)


@gluon.jit
def rescale(acc, alpha, HALF: gl.constexpr, C: gl.constexpr):
    """The sums [64, Dv] times a factor for each row, which is mostly 1 where tiles are skipped."""
    factor = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))
    moves = 1
    if C.SKIP:
        moves = any_row_of_warp(factor != 1.0, HALF)
    if moves != 0:
        acc = acc * gl.expand_dims(factor, 1)
    return acc

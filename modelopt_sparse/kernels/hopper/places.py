"""Which rows a program of the Hopper prefill kernel has, which keys these see, and in what order."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .sizes import KEYS, ROWS, WARPS

_HEADS_TOGETHER = gl.constexpr(8)
_SEARCH = gl.constexpr(128)


class Order(NamedTuple):
    """The key tiles of a program in the order of visits.

    Args:
        top, bottom: the last and first tile that a row sees.
        n_last, n_first: where tiles are skipped: visits of the last and of the first tiles of the warpgroups,
            which come before all others.
        given: pointers to a list of tiles and to its tags, where one is given.
    """

    top: Any
    bottom: Any
    n_last: Any
    n_first: Any
    given: Any


@gluon.jit
def program_place(pid, n_blocks, n_heads):
    """Head and row block of a program: the last rows, which see most, come first."""
    of_heads = _HEADS_TOGETHER * n_blocks
    first_head = pid // of_heads * _HEADS_TOGETHER
    n_here = gl.minimum(n_heads - first_head, _HEADS_TOGETHER)
    place = pid % of_heads
    return first_head + place % n_here, n_blocks - 1 - place // n_here


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def find_sequence(index, q_len, k_len, n_sequences, CAUSAL: gl.constexpr):
    """The sequence that owns super-block `index` of the call, and the block's number in that sequence."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    sequence = 0
    number = index
    before = 0
    # One alone needs no search.
    n_searched = gl.where(n_sequences > 1, n_sequences, 0)
    for start in range(0, n_searched, _SEARCH):
        s = start + gl.arange(0, _SEARCH, layout=layout)
        n_q = gl.load(q_len + s, mask=s < n_sequences, other=0)
        n_k = gl.load(k_len + s, mask=s < n_sequences, other=0)
        first = n_q * 0
        if CAUSAL:
            first = n_k - n_q
        count = gl.where(n_q > 0, ((first + n_q - 1) >> 7) - (first >> 7) + 1, 0)
        stop = before + gl.associative_scan(count, 0, _add)
        is_before = (stop <= index) & (s < n_sequences)
        sequence += gl.sum(is_before.to(gl.int32), 0)
        number = gl.minimum(number, index - gl.max(gl.where(is_before, stop, 0), 0))
        before += gl.sum(count, 0)
    return sequence, number


@gluon.jit
def limits_of(position, n_k, window, CAUSAL: gl.constexpr):
    """The keys [low, high) that a row at a position sees."""
    low = position * 0
    high = low + n_k
    if CAUSAL:
        low = gl.maximum(position - window + 1, 0)
        high = gl.maximum(gl.minimum(position + 1, n_k), low)
    return low, high


@gluon.jit
def ends_of(start, first, last_row, top, bottom, n_k, window, C: gl.constexpr):
    """The last and first key tile that a warpgroup's rows see; the program's where they see none."""
    begin = gl.maximum(start, first)
    end = gl.minimum(start + ROWS - 1, last_row)
    low, high_of_first = limits_of(begin, n_k, window, C.CAUSAL)
    low_of_last, high = limits_of(end, n_k, window, C.CAUSAL)
    last = (high + KEYS - 1) // KEYS - 1
    lowest = low // KEYS
    sees_none = (last < lowest) | (start + ROWS - 1 < first) | (start > last_row)
    return gl.where(sees_none, top, last), gl.where(sees_none, bottom, lowest)


@gluon.jit
def tile_of(visit, order, C: gl.constexpr):
    """The key tile of a visit: of a list, or last tiles, first tiles, then the rest from the end downward."""
    if C.GIVEN:
        return gl.load(order.given[0] + visit).to(gl.int32)
    else:
        n_ends = order.n_last + order.n_first
        end = gl.where(visit < order.n_last, order.top - visit, order.bottom + visit - order.n_last)
        rest = order.top - visit
        if C.SKIP:
            rest = order.top - 1 - (visit - n_ends)
        return gl.where(visit < n_ends, end, rest)


@gluon.jit
def takes_part(visit, tile, order, ends, HALF: gl.constexpr, C: gl.constexpr):
    """Whether a visit's key tile is this warpgroup's: its last, its first, or between; or tagged as its own.

    Args:
        ends: the last and first key tile that its rows see.
    """
    if C.GIVEN:
        return (gl.load(order.given[1] + visit).to(gl.int32) >> HALF & 1) != 0
    elif C.SKIP:
        last, first = ends
        n_ends = order.n_last + order.n_first
        is_last = (visit < order.n_last) & (tile == last)
        is_first = (visit >= order.n_last) & (visit < n_ends) & (tile == first) & (tile < last)
        between = (visit >= n_ends) & (tile < last) & (tile > first)
        return is_last | is_first | between
    else:
        return True

"""Which rows a program of the Hopper prefill kernel has, which keys these see, and in what visits."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .sizes import KEYS, ROWS, WARPS

_HEADS_TOGETHER = gl.constexpr(8)
_SEARCH = gl.constexpr(128)


class Visits(NamedTuple):
    """The key tiles of a program, in the order in which its warpgroups visit them.

    Args:
        n: how many.
        top, bottom: the last and first tile that a row sees.
        full_top, full_bottom: the last and first of which every row sees every key; where tiles are skipped,
            and which is neither warpgroup's end.
        ends: the last and first tile that the rows of each warpgroup see.
        n_last, n_first: where tiles are skipped: visits of the last and of the first tiles of the warpgroups,
            which come before all others.
        first_key, stop_key: the keys [first, stop) that some row sees.
        given: pointers to a list of tiles and to its tags, where one is given.
    """

    n: Any
    top: Any
    bottom: Any
    full_top: Any
    full_bottom: Any
    ends: Any
    n_last: Any
    n_first: Any
    first_key: Any
    stop_key: Any
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
    # Each warp searches for itself.
    layout: gl.constexpr = gl.BlockedLayout([_SEARCH // 32], [32], [WARPS], [0])
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
def _ends_of(start, first, last_row, top, bottom, n_k, window, C: gl.constexpr):
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
def visits_of(start, first, n_q, n_k, window, given, n_given, C: gl.constexpr):
    """The visits of a program that has rows.

    Args:
        start: position of its first row; the sequence's are [first, first + n_q).
        n_k, window: keys of the sequence, and how many a row sees.
        given, n_given: a list of tiles, as in `Visits`, and its length.
    """
    last_row = gl.minimum(start + 128, first + n_q) - 1
    first_key, full_high = limits_of(gl.maximum(start, first), n_k, window, C.CAUSAL)
    full_low, stop_key = limits_of(last_row, n_k, window, C.CAUSAL)
    top = (stop_key + KEYS - 1) // KEYS - 1
    bottom = first_key // KEYS
    full_top = gl.minimum(full_high // KEYS - 1, top)
    full_bottom = gl.maximum((full_low + KEYS - 1) // KEYS, bottom)
    last_0, first_0 = _ends_of(start, first, last_row, top, bottom, n_k, window, C)
    last_1, first_1 = _ends_of(start + ROWS, first, last_row, top, bottom, n_k, window, C)
    n = gl.maximum(top - bottom + 1, 0)
    n_last = top * 0
    n_first = top * 0
    if C.GIVEN:
        n = n_given
    if C.SKIP:
        least_last = gl.minimum(last_0, last_1)
        greatest_first = gl.maximum(first_0, first_1)
        n_last = gl.minimum(top - least_last + 1, n)
        n_first = gl.where(top > bottom, greatest_first - bottom + 1, 0)
        n = gl.maximum(n_last + n_first + top - bottom - 1, n_last)
        full_top = gl.minimum(full_top, least_last - 1)
        full_bottom = gl.maximum(full_bottom, greatest_first + 1)
    ends = ((last_0, first_0), (last_1, first_1))
    return Visits(
        n, top, bottom, full_top, full_bottom, ends, n_last, n_first, first_key, stop_key, given
    )  # fmt: skip


@gluon.jit
def tile_of(visit, visits, C: gl.constexpr):
    """The key tile of a visit: of a list, or last tiles, first tiles, then the rest from the end downward."""
    if C.GIVEN:
        return gl.load(visits.given[0] + visit).to(gl.int32)
    else:
        n_ends = visits.n_last + visits.n_first
        end = gl.where(
            visit < visits.n_last, visits.top - visit, visits.bottom + visit - visits.n_last
        )
        rest = visits.top - visit
        if C.SKIP:
            rest = visits.top - 1 - (visit - n_ends)
        return gl.where(visit < n_ends, end, rest)


@gluon.jit
def takes_part(visit, tile, visits, HALF: gl.constexpr, C: gl.constexpr):
    """Whether a visit's key tile is the warpgroup's: its last, its first, between; or tagged as its own."""
    if C.GIVEN:
        return (gl.load(visits.given[1] + visit).to(gl.int32) >> HALF & 1) != 0
    elif C.SKIP:
        last, first = visits.ends[HALF]
        n_ends = visits.n_last + visits.n_first
        is_last = (visit < visits.n_last) & (tile == last)
        is_first = (visit >= visits.n_last) & (visit < n_ends) & (tile == first) & (tile < last)
        between = (visit >= n_ends) & (tile < last) & (tile > first)
        return is_last | is_first | between
    else:
        return True

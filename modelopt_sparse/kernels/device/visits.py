"""Which key tiles a program visits, and in which order."""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import visible

_FAR = tl.constexpr(2**30)


@triton.jit
def limits_of(position, n_k, window, C: tl.constexpr):
    """The keys [low, high) that a row at a position sees, where nothing but causality and window say so.

    Both grow with the position, so the limits of consecutive rows follow from the first and the last.
    """
    if C.CAUSAL:
        low = tl.maximum(position - window + 1, 0)
        return low, tl.maximum(tl.minimum(position + 1, n_k), low)
    return position * 0, position * 0 + n_k


@triton.jit
def block_limits(low, high, is_row, first, last, n_k, window, C: tl.constexpr):
    """What the rows of a program see, at least and at most.

    Args:
        low, high: [BLOCK_M], the keys each row sees. first, last: positions of the first and last row.
    Returns:
        first_key, stop_key: from the first key that any row sees to one past the last.
        full_low, full_high: keys in between are seen by every row.
    """
    if C.HAS_BOUNDS:
        sees = high > low
        first_key = tl.min(tl.where(sees, low, _FAR), 0)
        stop_key = tl.max(tl.where(sees, high, 0), 0)
        full_low = tl.max(tl.where(is_row, low, 0), 0)
        return first_key, stop_key, full_low, tl.min(tl.where(is_row, high, _FAR), 0)
    first_key, full_high = limits_of(first, n_k, window, C)
    full_low, _ = limits_of(last, n_k, window, C)
    stop_key = tl.max(tl.where(is_row, high, 0), 0)
    return first_key, stop_key, full_low, full_high


@triton.jit
def tile_limits(limits, first, num_sink_tokens, dense_window_size, C: tl.constexpr):
    """The visible and the fully visible key tiles of a program's rows.

    Args:
        limits: from `block_limits`. first: position of the first row.
    Returns:
        top, bottom: the last and first tile in which a row sees a key; top < bottom where none does.
        full_top, full_bottom: the last and first tile in which every row sees every key, and no key is
            shielded from N:M; full_top < full_bottom where there is none.
    """
    first_key, stop_key, full_low, full_high = limits
    top = (stop_key + C.BLOCK_N - 1) // C.BLOCK_N - 1
    bottom = first_key // C.BLOCK_N
    if C.N > 0:
        full_high = tl.minimum(full_high, tl.maximum(first - dense_window_size + 1, 0))
        full_low = tl.maximum(full_low, num_sink_tokens)
    full_top = full_high // C.BLOCK_N - 1
    full_bottom = (full_low + C.BLOCK_N - 1) // C.BLOCK_N
    if C.ONLY_EDGES:
        full_top = -1
    return top, bottom, tl.minimum(full_top, top), tl.maximum(full_bottom, bottom)


@triton.jit
def row_tile_limits(
    low, high, top, bottom, start, first, last, n_k, window, group, grids, C: tl.constexpr
):  # fmt: skip
    """The last and first visible key tile of each row tile.

    A row tile that sees nothing gets the program's.

    Args:
        start: position of the program's first row tile. first, last: positions of its first and last row.
        group: [BLOCK_M], the row tile of each row.
    Returns:
        last, first: [BLOCK_M], those of each row's row tile. least_last, greatest_first: of all.
    """
    GROUPS: tl.constexpr = C.GROUPS
    ROWS: tl.constexpr = C.BLOCK_M // C.GROUPS
    least_last = top
    greatest_first = bottom
    last_tile = group * 0 + top
    first_tile = group * 0 + bottom
    if C.HAS_GRIDS or C.HAS_BOUNDS:
        sees = high > low
        row_last = tl.where(sees, (high + C.BLOCK_N - 1) // C.BLOCK_N - 1, -1)
        row_first = tl.where(sees, low // C.BLOCK_N, _FAR)
        if C.HAS_GRIDS:
            row_last, row_first = seen_tiles(low, high, sees, top, bottom, grids, C)
    for g in tl.static_range(GROUPS):
        if C.HAS_GRIDS or C.HAS_BOUNDS:
            here = tl.max(tl.where(group == g, row_last, -1), 0)
            there = tl.min(tl.where(group == g, row_first, _FAR), 0)
        else:
            low_first, high_first = limits_of(tl.maximum(start + g * ROWS, first), n_k, window, C)
            low_last, high_last = limits_of(
                tl.minimum(start + g * ROWS + ROWS - 1, last), n_k, window, C
            )
            here = (high_last + C.BLOCK_N - 1) // C.BLOCK_N - 1
            there = low_first // C.BLOCK_N
        sees_none = (
            (here < there) | (start + g * ROWS + ROWS - 1 < first) | (start + g * ROWS > last)
        )
        here = tl.where(sees_none, top, here)
        there = tl.where(sees_none, bottom, there)
        last_tile = tl.where(group == g, here, last_tile)
        first_tile = tl.where(group == g, there, first_tile)
        least_last = tl.minimum(least_last, here)
        greatest_first = tl.maximum(greatest_first, there)
    return last_tile, first_tile, least_last, greatest_first


@triton.jit
def seen_tiles(low, high, sees, top, bottom, grids, C: tl.constexpr):
    """The last and first tile in which each row sees a key, by looking at masks and biases: [BLOCK_M]."""
    mask, bias = grids
    last = low * 0 - 1
    first = low * 0 + _FAR
    for tile in range(bottom, top + 1):
        keys = tile * C.BLOCK_N + tl.arange(0, C.BLOCK_N)
        here = tl.max(visible(keys, low, high, sees, mask, bias, C).to(tl.int32), 1) != 0
        last = tl.where(here, tile, last)
        first = tl.where(here & (first == _FAR), tile, first)
    return last, first


@triton.jit
def ordered_tile(visit, order):
    """The key tile of a visit: last tiles, first tiles, then the rest from the end downward.

    So every row tile has seen its local maximum and its attention sink before its first decision.

    Args:
        order: (top, bottom, n_last, n_first); row tiles may differ in their last and in their first tile.
    """
    top, bottom, n_last, n_first = order
    n_ends = n_last + n_first
    end = tl.where(visit < n_last, top - visit, bottom + visit - n_last)
    return tl.where(visit < n_ends, end, top - 1 - (visit - n_ends))


@triton.jit
def takes_part(visit, tile, order, last, first):
    """The rows whose row tile has this visit's key tile as its last, its first, or in between.

    Args:
        last, first: [BLOCK_M], from `row_tile_limits`.
    """
    top, bottom, n_last, n_first = order
    is_last = (visit < n_last) & (tile == last)
    is_first = (visit >= n_last) & (visit < n_last + n_first) & (tile == first) & (tile < last)
    between = (visit >= n_last + n_first) & (tile < last) & (tile > first)
    # Triton 3.9's interpreter makes an int of a scalar truth and a block of them.
    return (is_last | is_first | between) != 0


@triton.jit
def list_limits(tiles, length, top, full_top, full_bottom, bottom):
    """Where a descending list enters the visible tiles, the full ones, leaves those, and leaves all."""
    start = length * 0
    full_start = length * 0
    full_stop = length * 0
    stop = length * 0
    for first in range(0, length, 256):
        at = first + tl.arange(0, 256)
        tile = tl.load(tiles + at, mask=at < length, other=-1).to(tl.int32)
        # Four counts of at most 256 in one sum, for each sum waits for all warps.
        counts = (tile > top).to(tl.int64)
        counts += (tile > full_top).to(tl.int64) << 10
        counts += (tile >= full_bottom).to(tl.int64) << 20
        counts += (tile >= bottom).to(tl.int64) << 30
        counts = tl.sum(counts, 0)
        start += (counts & 1023).to(tl.int32)
        full_start += (counts >> 10 & 1023).to(tl.int32)
        full_stop += (counts >> 20 & 1023).to(tl.int32)
        stop += (counts >> 30).to(tl.int32)
    # What is full may lie beyond what is visible where N:M shields, and then there is none.
    full_start = tl.minimum(full_start, stop)
    full_stop = tl.minimum(tl.maximum(full_stop, full_start), stop)
    return start, full_start, full_stop, stop

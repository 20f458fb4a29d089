"""Skip-softmax: which row tiles skip a key tile. Source: BLASST (arXiv 2512.12087).

A program's BLOCK_M rows are GROUPS row tiles, each of which decides for itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from modelopt_sparse.kernels.device.bins import BINS, BINS_PER_OCTAVE

_LEAST_FLOAT = tl.constexpr(-3.4028234663852886e38)
_BINS, _BINS_PER_OCTAVE = tl.constexpr(BINS), tl.constexpr(BINS_PER_OCTAVE)


@triton.jit
def row_tile_of_rows(BLOCK_M: tl.constexpr, GROUPS: tl.constexpr):
    """The row tile of each of a program's rows, counted from its first: [BLOCK_M]."""
    return tl.arange(0, BLOCK_M) // (BLOCK_M // GROUPS)


@triton.jit
def vote(tile_max, running, threshold, is_row, group):
    """The vote of each row tile on a key tile: it is skipped if every row that sees a key there needs none.

    Args:
        tile_max, running: [BLOCK_M] log2, -inf where nothing was seen. threshold: log2(lambda).
        is_row: [BLOCK_M], False for padding rows. group: [BLOCK_M], the row tile of each row.
    Returns:
        kept, seen: int32; bit g says that row tile g keeps the key tile, or that a row of it sees a key.
    """
    bit = 1 << group
    sees = is_row & (tile_max != float("-inf"))
    # A score that is not a number keeps the tile; so does a row's first, for no finite score is
    # below the least float. A row that sees nothing is.
    limit = running + threshold
    needs = is_row & ((tile_max < tl.where(limit > _LEAST_FLOAT, limit, _LEAST_FLOAT)) == 0)
    ballot = _joined(tl.where(needs, bit, 0) | tl.where(sees, bit << 8, 0))
    return ballot & 255, ballot >> 8


@triton.jit
def count_skipped(
    tile_max, running, counted, is_row, group, below, GROUPS: tl.constexpr, THRESHOLDS: tl.constexpr
):
    """Adds, for each further threshold, how many row tiles would skip the key tile.

    Args:
        counted: a tuple, log2 of the thresholds. below: [THRESHOLDS].
    """
    # Thresholds whose votes are joined together: a bit of a word each.
    TOGETHER: tl.constexpr = min(THRESHOLDS, 16)
    place = tl.arange(0, THRESHOLDS)
    for g in tl.static_range(GROUPS):
        sees = is_row & (tile_max != float("-inf")) & (group == g)
        below += tl.max(sees.to(tl.int32), 0)
        for first in tl.static_range(0, THRESHOLDS, TOGETHER):
            needs = group * 0
            for i in tl.static_range(TOGETHER):
                stays = sees & ((tile_max < running + counted[first + i]) == 0)
                needs |= tl.where(stays, 1 << i, 0)
            bit = place - first
            is_here = (bit >= 0) & (bit < TOGETHER)
            kept = tl.reduce(needs, 0, _either) >> tl.where(is_here, bit, 0)
            below -= tl.where(is_here, kept & 1, 0)
    return below


@triton.jit
def add_to_histogram(tile_max, running, is_row, group, histogram, GROUPS: tl.constexpr):
    """Adds each row tile that sees a key there to the bin of the least lambda above which it skips the tile.

    Args:
        histogram: (pointers to the first bin of each head [HEADS], whether there is such a head, the step
            from bin to bin).
    """
    first_bin, exists, step = histogram
    sees = is_row & (tile_max != float("-inf"))
    # Above every number in a row's first tile, and where a score is not a number.
    distance = tile_max - running
    distance = tl.where(distance == distance, distance, float("inf"))
    distance = tl.where(sees, distance, float("-inf"))
    for g in tl.static_range(GROUPS):
        most = tl.max(tl.where(group == g, distance, float("-inf")), 0)
        place = tl.minimum(tl.maximum(tl.ceil(-most * _BINS_PER_OCTAVE), 0.0), _BINS - 1.0)
        is_seen = tl.max((sees & (group == g)).to(tl.int32), 0)
        pointers = first_bin + place.to(tl.int32) * step
        tl.atomic_add(pointers, exists.to(tl.int64) * is_seen, mask=exists, sem="relaxed")


@triton.jit
def gather_tiles(pending, words, word_step, tile, kept, is_full, GROUPS: tl.constexpr):
    """Adds the bit of a key tile to a word of each row tile that keeps it. Tiles come in falling order.

    Args:
        pending: [GROUPS], bits that are not stored yet, the last one lowest.
        words: pointer to the words of the first row tile; those of the next lie `word_step` words on.
        is_full: this is the last visit, or the next is of a tile in another word.
    Returns:
        pending.
    """
    group = tl.arange(0, GROUPS)
    pending = (pending << 1) | ((kept >> group) & 1)
    if is_full:
        bits = pending << (tile & 31)
        tl.atomic_or(words + group * word_step + (tile >> 5), bits, mask=bits != 0, sem="relaxed")
        pending = pending * 0
    return pending


@triton.jit
def bit_count(bits, GROUPS: tl.constexpr):
    """How many of the lowest GROUPS bits are set."""
    n = bits & 1
    for g in tl.static_range(1, GROUPS):
        n += (bits >> g) & 1
    return n


@triton.jit
def _joined(bits):
    """The bits of all rows, in one number.

    `tl.split` wants both rows of a pair in one thread. Rows 4 apart never are, so the bits go
    through shared memory, and then each warp has those of all rows and needs no other warp.
    """
    if bits.shape[0] == 128:
        bits = tl.reshape(tl.reduce(tl.reshape(bits, [8, 2, 8]), 1, _either), [64])
    HALF: tl.constexpr = bits.shape[0] // 2
    left, right = tl.split(tl.permute(tl.reshape(bits, [HALF // 4, 2, 4]), [0, 2, 1]))
    return tl.reduce(tl.reshape(left | right, [HALF]), 0, _either)


@triton.jit
def _either(a, b):
    return a | b

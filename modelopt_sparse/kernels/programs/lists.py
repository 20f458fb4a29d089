"""Lists of key tiles from a bitmap, so that a kernel walks the tiles it computes and no others."""

from __future__ import annotations

import triton
import triton.language as tl

from modelopt_sparse.kernels.device.run_time import RUN_TIME
from modelopt_sparse.kernels.device.sequence import (
    find_sequence,
    first_position,
    first_super_block,
    is_left_out,
    row_limits,
)

# Words of 32 tiles that a program expands at a time.
_WORDS = tl.constexpr(16)


@triton.jit(do_not_specialize=RUN_TIME)
def row_lists_kernel(
    words, lists, tags, lengths, n_heads, n_words, list_stride, GROUPS: tl.constexpr
):
    """The key tiles of one row block of one head, the last first.

    Args:
        words: int32 [slots, Hq, n_words].
        lists: int16 [slots / GROUPS, Hq, list_stride], tiles. tags: uint16 of the same shape, the bits of the
            block's GROUPS row tiles that compute a tile. lengths: int32 [slots / GROUPS, Hq].
            (Narrow, for an asynchronous copy of what an address depends on would wait for all others.)
    """
    block = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    mine = words + (block * GROUPS * n_heads + head) * n_words
    place = block * n_heads + head
    bit = 31 - tl.arange(0, 32)
    length = 0
    for chunk in range(0, n_words, _WORDS):
        word = n_words - 1 - chunk - tl.arange(0, _WORDS)
        groups = tl.full([_WORDS * 32], 0, tl.int32)
        for g in tl.static_range(GROUPS):
            row = tl.load(mine + g * n_heads * n_words + word, mask=word >= 0, other=0)
            set_bits = (row[:, None] >> bit[None, :]) & 1
            groups |= tl.reshape(set_bits, [_WORDS * 32]) << g
        tile = tl.reshape(word[:, None] * 32 + bit[None, :], [_WORDS * 32])
        taken = (groups != 0).to(tl.int32)
        at = length + tl.cumsum(taken, 0) - 1
        tl.store(lists + place * list_stride + at, tile.to(tl.int16), mask=taken != 0)
        tl.store(tags + place * list_stride + at, groups.to(tl.uint16), mask=taken != 0)
        length += tl.sum(taken, 0)
    tl.store(lengths + place, length)


@triton.jit(do_not_specialize=RUN_TIME)
def column_lists_kernel(
    words, n_words, lists, tags, lengths, list_stride,
    q_start, q_len, k_len, n_sequences, n_heads, n_members,
    bounds, window, num_sink_tokens, dense_window_size,
    C: tl.constexpr,
):  # fmt: skip
    """Which row blocks of a KV head's query heads compute the key tiles of one super-block of keys.

    Row blocks are counted from the super-block of the sequence's first row. They are listed from the front of
    a list; from its end, those of which some row may not see some key.

    Args:
        words: as for `row_lists_kernel`; for C.GIVEN.
        lists: int16 [key tiles, Hk, list_stride], row blocks. tags: uint16 of the same shape, for C.GIVEN:
            the bits of the row tiles, as for `row_lists_kernel`, and from bit 8 on which of the KV head's
            n_members query heads. lengths: int32 [key tiles, Hk, 2], of the two lists; zeros where there is
            no sequence, or another launch's. Without C.GIVEN all heads are one.
    """
    PARTS: tl.constexpr = 128 // C.BLOCK_N
    # Row blocks that a program looks at together.
    BLOCKS: tl.constexpr = 32
    super_block = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.arange(0, PARTS)
    place = (super_block * PARTS + part).to(tl.int64) * tl.num_programs(1) + kv_head
    sequence, number = find_sequence(super_block, q_len, k_len, n_sequences, True, C.CAUSAL)
    n_q = tl.load(q_len + sequence, mask=sequence >= 0, other=0)
    sequence = tl.maximum(sequence, 0)
    n_k = tl.load(k_len + sequence)
    if is_left_out(n_q, C):
        n_q = n_q * 0
    first = first_position(n_q, n_k, C.CAUSAL)
    first_row = tl.load(q_start + sequence)
    base = (first >> 7) * 128
    n_blocks = tl.where(n_q > 0, (first + n_q - 1 - base) // C.BLOCK_M + 1, 0)
    key = (number * PARTS + part) * C.BLOCK_N
    first_slot = 0
    if C.GIVEN:
        first_slot = first_super_block(sequence, q_len, k_len, n_sequences, C.CAUSAL) * (
            128 // C.TILE_ROWS
        )
    n_full = part * 0
    n_edges = part * 0
    first_block = 0
    if C.CAUSAL and not C.HAS_BOUNDS:
        # Rows before the first key see none.
        first_block = tl.maximum(number * 128 - base, 0) // C.BLOCK_M
    for start in range(first_block, n_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        position = base + block[:, None] * C.BLOCK_M + tl.arange(0, C.BLOCK_M)[None, :]
        is_row = (position >= first) & (position < first + n_q)
        row = first_row + position - first
        low, high = row_limits(position, row, is_row, n_k, bounds, window, C.CAUSAL, C.HAS_BOUNDS)
        sees = high > low
        lowest = tl.min(tl.where(sees, low, 2**30), 1)
        highest = tl.max(tl.where(sees, high, 0), 1)
        full_low = tl.max(low, 1)
        full_high = tl.min(tl.where(is_row, high, 0), 1)
        if C.N > 0:
            full_low = tl.maximum(full_low, num_sink_tokens)
            full_high = tl.minimum(full_high, tl.min(position, 1) - dense_window_size + 1)
        seen = (key[None, :] < highest[:, None]) & (key[None, :] + C.BLOCK_N > lowest[:, None])
        is_edge = (key[None, :] + C.BLOCK_N > full_high[:, None]) | (
            key[None, :] < full_low[:, None]
        )
        if C.ONLY_EDGES:
            is_edge = is_edge | True
        entry = block[:, None] + part[None, :] * 0
        for member in range(0, n_members):
            taken = seen
            groups = entry * 0
            if C.GIVEN:
                head = kv_head * n_members + member
                exists = (block < n_blocks)[:, None] & (key < n_k)[None, :]
                groups = row_tiles_that_compute(
                    words, n_words, first_slot, block, key, exists, head, n_heads, C
                )
                taken = taken & (groups != 0)
            to_full = (taken & (is_edge == 0)).to(tl.int32)
            to_edges = (taken & is_edge).to(tl.int32)
            at_full = n_full[None, :] + tl.cumsum(to_full, 0) - 1
            at_edge = list_stride - n_edges[None, :] - tl.cumsum(to_edges, 0)
            at = (place * list_stride)[None, :] + tl.where(to_full != 0, at_full, at_edge)
            tl.store(lists + at, entry.to(tl.int16), mask=taken)
            if C.GIVEN:
                tl.store(tags + at, (groups | (member << 8)).to(tl.uint16), mask=taken)
            n_full += tl.sum(to_full, 0)
            n_edges += tl.sum(to_edges, 0)
    tl.store(lengths + place * 2, n_full)
    tl.store(lengths + place * 2 + 1, n_edges)


@triton.jit
def row_tiles_that_compute(
    words, n_words, first_slot, block, key, exists, head, n_heads, C: tl.constexpr
):
    """Bits of the row tiles of some row blocks that compute some key tiles: int32 [blocks, key tiles].

    Args:
        first_slot: the slot of the row tile at which row blocks are counted from.
        block: [blocks]. key: [key tiles], the first key of each.
    """
    GROUPS: tl.constexpr = C.GROUPS
    tile = key // C.TILE_KEYS
    groups = block[:, None] * 0 + key[None, :] * 0
    for g in tl.static_range(GROUPS):
        slot = (first_slot + (block * C.BLOCK_M + g * C.TILE_ROWS) // C.TILE_ROWS).to(tl.int64)
        pointers = words + ((slot * n_heads + head) * n_words)[:, None] + (tile >> 5)[None, :]
        word = tl.load(pointers, mask=exists, other=0)
        groups |= ((word >> (tile & 31)[None, :]) & 1) << g
    return groups

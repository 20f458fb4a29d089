"""Which rows are a program's: its head, its sequence, their positions, and the keys that each row sees."""

from __future__ import annotations

import triton
import triton.language as tl

# Sequences that a program looks at together when it searches for its own.
_SEARCH = tl.constexpr(32)

# Heads that run at the same time, so that their keys stay in the cache.
_HEADS_TOGETHER = tl.constexpr(8)


@triton.jit
def program_place(pid, n_blocks, n_heads):
    """Head and row block of a program: the last rows, which see most, come first."""
    of_heads = _HEADS_TOGETHER * n_blocks
    first_head = pid // of_heads * _HEADS_TOGETHER
    n_here = tl.minimum(n_heads - first_head, _HEADS_TOGETHER)
    place = pid % of_heads
    return first_head + place % n_here, n_blocks - 1 - place // n_here


@triton.jit
def first_position(n_q, n_k, CAUSAL: tl.constexpr):
    """Position of a sequence's first row; below 0 where it has more rows than keys."""
    return n_k - n_q if CAUSAL else n_q * 0


@triton.jit
def first_key_of(k_start, sequence, C: tl.constexpr):
    """The token of a sequence's first key; in pages, where a table says where keys lie, 0."""
    if C.PAGE > 0:
        return sequence.to(tl.int64) * 0
    else:
        return tl.load(k_start + sequence).to(tl.int64)


@triton.jit
def super_block_count(n_q, n_k, CAUSAL: tl.constexpr):
    """Super-blocks of 128 positions, anchored at position 0, in which a sequence has rows."""
    first = first_position(n_q, n_k, CAUSAL)
    return tl.where(n_q > 0, ((first + n_q - 1) >> 7) - (first >> 7) + 1, 0)


@triton.jit
def find_sequence(index, q_len, k_len, n_sequences, OF_KEYS: tl.constexpr, CAUSAL: tl.constexpr):
    """The sequence that owns super-block `index` of the call, and the block's number in that sequence.

    Super-blocks are numbered through all sequences in turn; of keys, where OF_KEYS.

    Returns:
        sequence (-1: there are not that many super-blocks), number.
    """
    if n_sequences == 1:
        n_q = tl.load(q_len)
        n_k = tl.load(k_len)
        count = (n_k + 127) >> 7 if OF_KEYS else super_block_count(n_q, n_k, CAUSAL)
        return tl.where(index < count, 0, -1), index
    sequence = -1
    number = 0
    before = 0
    for start in range(0, n_sequences, _SEARCH):
        s = start + tl.arange(0, _SEARCH)
        n_q = tl.load(q_len + s, mask=s < n_sequences, other=0)
        n_k = tl.load(k_len + s, mask=s < n_sequences, other=0)
        count = (n_k + 127) >> 7 if OF_KEYS else super_block_count(n_q, n_k, CAUSAL)
        stop = before + tl.cumsum(count, 0)
        owns = (stop - count <= index) & (index < stop)
        sequence = tl.maximum(sequence, tl.max(tl.where(owns, s, -1), 0))
        number += tl.sum(tl.where(owns, index - stop + count, 0), 0)
        before += tl.sum(count, 0)
    return sequence, number


@triton.jit
def is_left_out(n_q, C: tl.constexpr):
    """Whether a sequence with so many rows is another launch's."""
    if C.ONLY_PREFILL:
        return n_q == 1
    if C.ONLY_DECODE:
        return n_q != 1
    return False


@triton.jit
def first_super_block(sequence, q_len, k_len, n_sequences, CAUSAL: tl.constexpr):
    """The number, through all sequences, of a sequence's first super-block of rows."""
    before = 0
    for start in range(0, n_sequences, _SEARCH):
        s = start + tl.arange(0, _SEARCH)
        n_q = tl.load(q_len + s, mask=s < sequence, other=0)
        n_k = tl.load(k_len + s, mask=s < sequence, other=0)
        before += tl.sum(super_block_count(n_q, n_k, CAUSAL), 0)
    return before


@triton.jit
def row_limits(
    position, row, is_row, n_k, bounds, window, CAUSAL: tl.constexpr, HAS_BOUNDS: tl.constexpr
):
    """The keys [low, high) that each row sees, before masks: int32 [BLOCK_M] each.

    Args:
        position, row: [BLOCK_M], where a row sits and which row of the packed tensors it is.
        window: keys that a causal row sees at most.
    """
    if HAS_BOUNDS:
        pair = bounds + row.to(tl.int64) * 2
        low = tl.maximum(tl.load(pair, mask=is_row, other=0), 0)
        high = tl.minimum(tl.load(pair + 1, mask=is_row, other=0), n_k)
    elif CAUSAL:
        low = tl.maximum(position - window + 1, 0)
        high = tl.minimum(position + 1, n_k)
    else:
        low = position * 0
        high = position * 0 + n_k
    return low, tl.where(is_row, tl.maximum(high, low), low)

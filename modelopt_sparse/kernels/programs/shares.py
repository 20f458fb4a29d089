"""Shares of long work: a key tile that many row blocks see would keep one program busy after all others."""

from __future__ import annotations

import triton
import triton.language as tl

from modelopt_sparse.kernels.device.run_time import RUN_TIME
from modelopt_sparse.kernels.device.scores import columns_to_keys
from modelopt_sparse.kernels.device.sequence import find_sequence, is_left_out

# Columns that the program looks at together.
_CHUNK = tl.constexpr(1024)


@triton.jit(do_not_specialize=RUN_TIME)
def shares_kernel(lengths, n_columns, n_programs, least, slots, n_slots, shares_of):
    """One program: splits those columns that have more visits than 1 / n_programs of all.

    A column is a key tile of one KV head. A share is a program's, and has a slot for what it sums up.

    Args:
        lengths: int32 [n_columns, 2], from `column_lists_kernel`.
        least: a column of no more visits is not split.
        slots: int32 [n_slots, 3]: column (-1: not used), number of the share, number of shares. n_slots: at
            least 2 * n_programs, which is more than there can be.
        shares_of: int32 [n_columns]; 0 where a column is not split.
    """
    total = n_columns.to(tl.int64) * 0
    for start in range(0, n_columns, _CHUNK):
        _, visits = columns_visits(start, lengths, n_columns)
        total += tl.sum(visits.to(tl.int64), 0)
    most = tl.maximum((total + n_programs - 1) // n_programs, least).to(tl.int32)
    used = n_columns * 0
    for start in range(0, n_columns, _CHUNK):
        column, visits = columns_visits(start, lengths, n_columns)
        shares = tl.where(visits > most, (visits + most - 1) // most, 0)
        slot = used + tl.cumsum(shares, 0) - shares
        tl.store(shares_of + column, shares, mask=column < n_columns)
        for share in range(0, tl.max(shares, 0)):
            of_slot = slots + (slot + share) * 3
            exists = share < shares
            tl.store(of_slot, column, mask=exists)
            tl.store(of_slot + 1, column * 0 + share, mask=exists)
            tl.store(of_slot + 2, shares, mask=exists)
        used += tl.sum(shares, 0)
    for start in range(used, n_slots, _CHUNK):
        slot = start + tl.arange(0, _CHUNK)
        tl.store(slots + slot * 3, slot * 0 - 1, mask=slot < n_slots)


@triton.jit
def columns_visits(start, lengths, n_columns):
    """Some columns, and how many visits each has."""
    column = start + tl.arange(0, _CHUNK)
    n_full = tl.load(lengths + column * 2, mask=column < n_columns, other=0)
    n_edges = tl.load(lengths + column * 2 + 1, mask=column < n_columns, other=0)
    return column, n_full + n_edges


@triton.jit(do_not_specialize=RUN_TIME)
def add_shares_kernel(
    k_sums, v_sums, shares, slots, d_k, d_v, d_k_strides, d_v_strides, q_len, k_start, k_len, n_sequences,
    n_heads, C: tl.constexpr,
):  # fmt: skip
    """One program: adds up the shares of a column, in order; for C.GIVEN, if its slot is that of the first.

    Args:
        k_sums, v_sums: fp32 [n_slots, C.BLOCK_N, C.BLOCK_D or C.BLOCK_DV], those of a column side by side.
        shares, slots: as for `key_gradient_kernel`; slots for C.GIVEN.
        n_heads: of keys.
    """
    PARTS: tl.constexpr = 128 // C.BLOCK_N
    if C.GIVEN:
        slot = tl.program_id(0)
        column = tl.load(slots + slot * 3)
        if column < 0:
            return
        if tl.load(slots + slot * 3 + 1) != 0:
            return
        shares = tl.load(slots + slot * 3 + 2)
    else:
        column = tl.program_id(0)
        slot = column * shares
    block = column // n_heads
    sequence, number = find_sequence(block // PARTS, q_len, k_len, n_sequences, True, C.CAUSAL)
    if sequence < 0:
        return
    if is_left_out(tl.load(q_len + sequence), C):
        return
    keys = (number * PARTS + block % PARTS) * C.BLOCK_N + columns_to_keys(C)
    place = (tl.load(k_start + sequence).to(tl.int64), keys, keys < tl.load(k_len + sequence))
    head = column % n_heads
    add_up(k_sums, slot, shares, d_k, d_k_strides, place, head, C.BLOCK_N, C.HEAD_DIM, C.BLOCK_D)
    add_up(v_sums, slot, shares, d_v, d_v_strides, place, head, C.BLOCK_N, C.HEAD_DIM_V, C.BLOCK_DV)


@triton.jit
def add_up(
    sums, slot, shares, x, strides, place, head,
    BLOCK_N: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores the sum of some slots as keys of a packed tensor."""
    tile = tl.full([BLOCK_N, BLOCK], 0.0, tl.float32)
    for share in range(0, shares):
        tile += tl.load(slot_pointers(sums, slot + share, BLOCK_N, BLOCK))
    store_keys(x, strides, place, head, tile, DIM, BLOCK)


@triton.jit
def visits_of_share(n_visits, share, shares):
    """Where the visits of a share begin and end."""
    most = (n_visits + shares - 1) // shares
    return tl.minimum(share * most, n_visits), tl.minimum((share + 1) * most, n_visits)


@triton.jit
def slot_pointers(sums, slot, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to what the program of a slot sums up: [BLOCK_N, BLOCK]."""
    row = slot.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return sums + row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def store_keys(x, strides, place, head, tile, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Stores the rows of a tile as keys of a packed tensor.

    Args:
        place: (first key of the sequence, positions [BLOCK_N], which of them exist).
    """
    first_key, keys, is_key = place
    token, per_head = strides
    channel = tl.arange(0, BLOCK)
    pointers = (
        x + head.to(tl.int64) * per_head + (first_key + keys)[:, None] * token + channel[None, :]
    )
    tl.store(pointers, tile.to(x.dtype.element_ty), mask=is_key[:, None] & (channel < DIM)[None, :])

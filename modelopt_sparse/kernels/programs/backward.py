"""The kernels of the backward pass: one for query rows, one for keys and values. No atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from modelopt_sparse.kernels.device.row_blocks import row_block_limits
from modelopt_sparse.kernels.device.run_time import RUN_TIME
from modelopt_sparse.kernels.device.scores import (
    columns_to_keys,
    grid_pointers,
    load_keys,
    load_rows,
)
from modelopt_sparse.kernels.device.sequence import (
    find_sequence,
    first_position,
    first_super_block,
    is_left_out,
    program_place,
    row_limits,
)
from modelopt_sparse.kernels.device.softmax import LOG2_E
from modelopt_sparse.kernels.device.visits import block_limits, list_limits, tile_limits
from modelopt_sparse.kernels.stages.skip import row_tile_of_rows

from .gradients import key_gradients, query_gradients
from .shares import slot_pointers, store_keys, visits_of_share


@triton.jit(do_not_specialize=RUN_TIME)
def prepare_kernel(
    out, lse, d_out, d_lse, row_sums, d_q, out_strides, d_out_strides, d_q_strides, n_rows, n_heads,
    C: tl.constexpr,
):  # fmt: skip
    """What the other kernels need of each row: its lse, inf where it sees no key, and its delta.

    delta is sum(d_out * out) - d_lse * log2(e): the gradient of a score is its weight times (d_p - delta).

    Args:
        lse, d_lse: [Tq, Hq], base 2. row_sums: [Hq, 2, Tq], lse and delta.
        d_q: zeros are written for rows that see no key, or that no sequence owns.
    """
    row = tl.program_id(0) * 64 + tl.arange(0, 64)
    head = tl.program_id(1)
    exists = row < n_rows
    entry = row.to(tl.int64) * n_heads + head
    of_row = tl.load(lse + entry, mask=exists, other=float("-inf"))
    sees = of_row != float("-inf")
    out_token, out_head = out_strides
    d_out_token, d_out_head = d_out_strides
    out += head.to(tl.int64) * out_head
    d_out += head.to(tl.int64) * d_out_head
    out_tile = load_rows(out, out_token, row, sees, C.HEAD_DIM_V, C.BLOCK_DV)
    d_out_tile = load_rows(d_out, d_out_token, row, sees, C.HEAD_DIM_V, C.BLOCK_DV)
    of_row_delta = tl.sum(out_tile.to(tl.float32) * d_out_tile.to(tl.float32), 1)
    if d_lse is not None:
        of_row_delta -= tl.load(d_lse + entry, mask=sees, other=0.0) * LOG2_E
    row_sums += head.to(tl.int64) * n_rows * 2 + row
    tl.store(row_sums, tl.where(sees, of_row, float("inf")), mask=exists)
    tl.store(row_sums + n_rows, of_row_delta, mask=exists)
    d_q_token, d_q_head = d_q_strides
    channel = tl.arange(0, C.BLOCK_D)
    d_q += head.to(tl.int64) * d_q_head
    pointers = d_q + row.to(tl.int64)[:, None] * d_q_token + channel[None, :]
    unseeing = (exists & (sees == 0))[:, None] & (channel < C.HEAD_DIM)[None, :]
    tl.store(pointers, tl.full([64, C.BLOCK_D], 0.0, d_q.dtype.element_ty), mask=unseeing)


@triton.jit(do_not_specialize=RUN_TIME)
def query_gradient_kernel(
    q, k, v, d_out, row_sums, d_q, k_boxes, v_boxes, box_rows, box_columns, v_box_columns,
    q_strides, k_strides, v_strides, d_out_strides, d_q_strides,
    q_start, q_len, k_start, k_len, n_sequences, n_super_blocks, n_heads, group, n_rows,
    bounds, window,
    mask, mask_row_start, mask_key_start, mask_item, mask_head, mask_row, mask_key,
    bias, bias_row_start, bias_key_start, bias_item, bias_head, bias_row, bias_key,
    d_bias, d_bias_item, d_bias_head, d_bias_row, d_bias_key,
    scale, softcap, num_sink_tokens, dense_window_size,
    words, n_words, lists, tags, list_lengths, list_stride,
    C: tl.constexpr,
):  # fmt: skip
    """One program: C.BLOCK_M positions of one query head, placed as in the forward kernel.

    Args:
        row_sums: [Hq, 2, Tq], from `prepare_kernel`. scale: above 0.
        d_bias: fp32 grid of the bias's rows and keys for every head; zeros so far.
        k_boxes, v_boxes: for C.BOXES, tensor descriptors, with what a head adds to their coordinates.
    """
    PARTS: tl.constexpr = 128 // C.BLOCK_M
    head, block = program_place(tl.program_id(0), n_super_blocks * PARTS, n_heads)
    super_block = block // PARTS
    sequence, number = find_sequence(super_block, q_len, k_len, n_sequences, False, C.CAUSAL)
    if sequence < 0:
        return
    n_q = tl.load(q_len + sequence)
    n_k = tl.load(k_len + sequence)
    if is_left_out(n_q, C):
        return

    first = first_position(n_q, n_k, C.CAUSAL)
    start = ((first >> 7) + number) * 128 + (block % PARTS) * C.BLOCK_M
    first_row = tl.maximum(start, first)
    last_row = tl.minimum(start + C.BLOCK_M, first + n_q) - 1
    if first_row > last_row:
        return
    position = start + tl.arange(0, C.BLOCK_M)
    is_row = (position >= first) & (position < first + n_q)
    row = tl.load(q_start + sequence) + position - first
    low, high = row_limits(position, row, is_row, n_k, bounds, window, C.CAUSAL, C.HAS_BOUNDS)

    kv_head = head // group
    first_key = tl.load(k_start + sequence).to(tl.int64)
    k_token, k_head = k_strides
    v_token, v_head = v_strides
    q_token, q_head = q_strides
    d_out_token, d_out_head = d_out_strides
    k += first_key * k_token + kv_head.to(tl.int64) * k_head
    v += first_key * v_token + kv_head.to(tl.int64) * v_head
    row_sums += head.to(tl.int64) * n_rows * 2 + row
    lse = tl.load(row_sums, mask=is_row, other=float("inf"))
    sums = (lse, tl.load(row_sums + n_rows, mask=is_row, other=0.0))
    q += head.to(tl.int64) * q_head
    d_out += head.to(tl.int64) * d_out_head
    q_tile = load_rows(q, q_token, row, is_row, C.HEAD_DIM, C.BLOCK_D)
    d_out_tile = load_rows(d_out, d_out_token, row, is_row, C.HEAD_DIM_V, C.BLOCK_DV)
    if C.UPCAST:
        q_tile = q_tile.to(tl.float32)
        d_out_tile = d_out_tile.to(tl.float32)
    scale_log2 = scale * LOG2_E
    factor = scale_log2 if C.IS_RAW else 1.0

    mask_pointers = grid_pointers(
        mask, mask_row_start, mask_key_start, mask_item, mask_head, mask_row, mask_key,
        sequence, head, position - first, C.HAS_MASK,
    )  # fmt: skip
    bias_pointers = grid_pointers(
        bias, bias_row_start, bias_key_start, bias_item, bias_head, bias_row, bias_key,
        sequence, head, position - first, C.HAS_BIAS,
    )  # fmt: skip
    grids = ((mask_pointers, mask_key), (bias_pointers, bias_key))
    d_bias_pointers = grid_pointers(
        d_bias, bias_row_start, bias_key_start, d_bias_item, d_bias_head, d_bias_row, d_bias_key,
        sequence, head, position - first, C.BIAS_GRADIENT,
    )  # fmt: skip
    bias_gradient = (d_bias_pointers, d_bias_key)

    limits = block_limits(low, high, is_row, first_row, last_row, n_k, window, C)
    top, bottom, full_top, full_bottom = tile_limits(
        limits, first_row, num_sink_tokens, dense_window_size, C
    )
    n_visits = tl.maximum(top - bottom + 1, 0)
    n_full = tl.maximum(full_top - full_bottom + 1, 0)
    n_before = tl.where(n_full > 0, top - full_top, n_visits)
    # Pointers that a variant has no use for: never read, but Triton wants them to have a type.
    given = (q_len, q_len)
    if C.GIVEN:
        TILES: tl.constexpr = C.TILE_KEYS // C.BLOCK_N
        list_number = (super_block * 128 + block % PARTS * C.BLOCK_M) // C.LIST_ROWS
        place = list_number.to(tl.int64) * n_heads + head
        given = (lists + place * list_stride, tags + place * list_stride)
        enter, full_start, full_stop, leave = list_limits(
            given[0], tl.load(list_lengths + place),
            top // TILES, (full_top + 1) // TILES - 1, (full_bottom + TILES - 1) // TILES, bottom // TILES,
        )  # fmt: skip
        given = (given[0] + enter, given[1] + enter)
        n_visits = (leave - enter) * TILES
        n_before = (full_start - enter) * TILES
        n_full = (full_stop - full_start) * TILES
    row_words = position
    if C.BITS:
        within = block % PARTS * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
        row_words = decision_pointers(
            words, n_words, sequence, super_block, within, head, n_heads, C
        )
    rows = (
        position,
        low,
        high,
        is_row,
        row_tile_of_rows(C.BLOCK_M, C.GROUPS),
        limits[0],
        limits[1],
    )
    visits = (top, n_before, n_full)
    box_row = first_key.to(tl.int32) + kv_head * box_rows
    k_box = (k_boxes, box_row, kv_head * box_columns)
    v_box = (v_boxes, box_row, kv_head * v_box_columns)
    kv = (k, v, k_token, v_token, k_box, v_box, n_k)
    numbers = (factor, scale_log2, softcap, (num_sink_tokens, dense_window_size))
    d_q_tile = tl.full([C.BLOCK_M, C.BLOCK_D], 0.0, tl.float32)
    if not C.ONLY_EDGES:
        d_q_tile = query_gradients(
            d_q_tile, n_before, n_before + n_full, q_tile, d_out_tile, kv, rows, sums, visits, given,
            row_words, grids, bias_gradient, numbers, C, False,
        )  # fmt: skip
    d_q_tile = query_gradients(
        d_q_tile, 0, n_visits - n_full, q_tile, d_out_tile, kv, rows, sums, visits, given, row_words,
        grids, bias_gradient, numbers, C, True,
    )  # fmt: skip

    d_q_token, d_q_head = d_q_strides
    channel = tl.arange(0, C.BLOCK_D)
    d_q += head.to(tl.int64) * d_q_head
    pointers = d_q + row.to(tl.int64)[:, None] * d_q_token + channel[None, :]
    inside = is_row[:, None] & (channel < C.HEAD_DIM)[None, :]
    # Rows that see no key may hold anything.
    d_q_tile = tl.where((lse == float("inf"))[:, None], 0.0, d_q_tile * scale)
    tl.store(pointers, d_q_tile.to(d_q.dtype.element_ty), mask=inside)


@triton.jit
def decision_pointers(
    words, n_words, sequence, super_block, within, head, n_heads, C: tl.constexpr
):
    """Pointers to the decisions of the row tiles of some rows.

    Args:
        super_block: the number of one, through all sequences. within: where rows lie from its beginning.
    """
    if C.TILE_ROWS > 0:
        slot = (super_block * (128 // C.TILE_ROWS) + within // C.TILE_ROWS).to(tl.int64)
    else:
        slot = sequence.to(tl.int64) + within * 0
    return words + (slot * n_heads + head) * n_words


@triton.jit(do_not_specialize=RUN_TIME)
def key_gradient_kernel(
    q, k, v, d_out, row_sums, d_k, d_v, shares, slots, n_slots, shares_of, k_sums, v_sums,
    q_boxes, d_out_boxes, box_rows, box_columns, d_out_box_columns,
    q_strides, k_strides, v_strides, d_out_strides, d_k_strides, d_v_strides,
    q_start, q_len, k_start, k_len, n_sequences, n_super_blocks, n_heads, group, n_rows,
    bounds, window,
    mask, mask_row_start, mask_key_start, mask_item, mask_head, mask_row, mask_key,
    bias, bias_row_start, bias_key_start, bias_item, bias_head, bias_row, bias_key,
    scale, softcap, num_sink_tokens, dense_window_size,
    words, n_words, lists, tags, list_lengths, list_stride,
    C: tl.constexpr,
):  # fmt: skip
    """One program: C.BLOCK_N keys of one KV head, for all query heads that read it, or a share of the visits.

    Args:
        shares: how many programs share the visits of each key tile. slots, shares_of: for C.GIVEN they say so
            in its place, see `shares_kernel`; the programs of slots come before the others.
        k_sums, v_sums: [n_slots, ..], what shares sum up; see `add_shares_kernel`.
        n_super_blocks: of keys. n_heads: of queries.
        lists, tags, list_lengths: from `column_lists_kernel`; for C.LISTED.
    """
    PARTS: tl.constexpr = 128 // C.BLOCK_N
    n_blocks = n_super_blocks * PARTS
    n_kv_heads = n_heads // group
    pid = tl.program_id(0)
    # The first keys are seen by most rows.
    if C.GIVEN:
        slot = pid
        share = 0
        shares = 1
        kv_head, from_last = program_place(pid - n_slots, n_blocks, n_kv_heads)
        block = n_blocks - 1 - from_last
        if pid < n_slots:
            column = tl.load(slots + pid * 3)
            if column < 0:
                return
            share = tl.load(slots + pid * 3 + 1)
            shares = tl.load(slots + pid * 3 + 2)
            kv_head = column % n_kv_heads
            block = column // n_kv_heads
        else:
            if tl.load(shares_of + block * n_kv_heads + kv_head) > 0:
                return
    else:
        kv_head, from_last = program_place(pid // shares, n_blocks, n_kv_heads)
        block = n_blocks - 1 - from_last
        share = pid % shares
        slot = (block * n_kv_heads + kv_head) * shares + share
    sequence, number = find_sequence(block // PARTS, q_len, k_len, n_sequences, True, C.CAUSAL)
    if sequence < 0:
        return
    n_q = tl.load(q_len + sequence)
    n_k = tl.load(k_len + sequence)
    if is_left_out(n_q, C):
        return

    tile = number * PARTS + block % PARTS
    first = first_position(n_q, n_k, C.CAUSAL)
    base = (first >> 7) * 128
    keys = tile * C.BLOCK_N + columns_to_keys(C)
    first_block, n_before, n_full, n_edges = row_block_limits(
        tile, base, first, n_q, n_k, window, num_sink_tokens, dense_window_size, C
    )
    is_key = keys < n_k
    first_key = tl.load(k_start + sequence).to(tl.int64)
    k_token, k_head = k_strides
    v_token, v_head = v_strides
    k += first_key * k_token + kv_head.to(tl.int64) * k_head
    v += first_key * v_token + kv_head.to(tl.int64) * v_head
    k_tile = load_keys(k, k_token, tile, is_key, C, C.HEAD_DIM, C.BLOCK_D)
    v_tile = load_keys(v, v_token, tile, is_key, C, C.HEAD_DIM_V, C.BLOCK_DV)
    scale_log2 = scale * LOG2_E
    factor = scale_log2 if C.IS_RAW else 1.0
    numbers = (factor, scale_log2, softcap, (num_sink_tokens, dense_window_size))
    place = (base, first, n_q, tl.load(q_start + sequence))
    heads = (kv_head * group, n_rows)
    queries = (
        q, d_out, q_strides, d_out_strides, (q_boxes, box_rows, box_columns),
        (d_out_boxes, box_rows, d_out_box_columns),
    )  # fmt: skip
    head_0 = sequence * 0
    row_0 = tl.arange(0, 1)
    mask_pointer = grid_pointers(
        mask, mask_row_start, mask_key_start, mask_item, mask_head, mask_row, mask_key,
        sequence, head_0, row_0, C.HAS_MASK,
    )  # fmt: skip
    bias_pointer = grid_pointers(
        bias, bias_row_start, bias_key_start, bias_item, bias_head, bias_row, bias_key,
        sequence, head_0, row_0, C.HAS_BIAS,
    )  # fmt: skip
    grids = (
        (mask_pointer, mask_head, mask_row, mask_key),
        (bias_pointer, bias_head, bias_row, bias_key),
    )
    # As above: what a variant has no use for.
    decisions = (q_len, 0, 0)
    if C.BITS:
        super_block = first_super_block(sequence, q_len, k_len, n_sequences, C.CAUSAL)
        pointer = decision_pointers(words, n_words, sequence, super_block, 0, 0, n_heads, C)
        decisions = (pointer, n_heads * n_words, n_words)
    given = (q_len, q_len)
    given_edges = given
    if C.LISTED:
        entry = block.to(tl.int64)
        if C.GIVEN:
            entry = entry * n_kv_heads + kv_head
        given = (lists + entry * list_stride, tags + entry * list_stride)
        given_edges = (given[0] + list_stride - 1, given[1] + list_stride - 1)
        n_full = tl.load(list_lengths + entry * 2)
        n_edges = tl.load(list_lengths + entry * 2 + 1)
    visits = (first_block, n_before, n_full)
    MEMBERS: tl.constexpr = 1 if C.GIVEN else C.MEMBERS
    limits = (bounds, window)
    state = (
        tl.full([C.BLOCK_N, C.BLOCK_D], 0.0, tl.float32),
        tl.full([C.BLOCK_N, C.BLOCK_DV], 0.0, tl.float32),
    )
    # Edges first: what only they need takes no registers from the other loop.
    start, stop = visits_of_share(n_edges * MEMBERS, share, shares)
    state = key_gradients(
        state, start, stop, k_tile, v_tile, keys, n_k, heads, queries, place, row_sums, visits, given_edges,
        decisions, limits, grids, numbers, C, True,
    )  # fmt: skip
    if not C.ONLY_EDGES:
        start, stop = visits_of_share(n_full * MEMBERS, share, shares)
        state = key_gradients(
            state, start, stop, k_tile, v_tile, keys, n_k, heads, queries, place, row_sums, visits, given,
            decisions, limits, grids, numbers, C, False,
        )  # fmt: skip

    d_k_tile, d_v_tile = state
    d_k_tile *= scale
    if slot < n_slots:
        tl.store(slot_pointers(k_sums, slot, C.BLOCK_N, C.BLOCK_D), d_k_tile)
        tl.store(slot_pointers(v_sums, slot, C.BLOCK_N, C.BLOCK_DV), d_v_tile)
        return
    owned = (first_key, keys, is_key)
    store_keys(d_k, d_k_strides, owned, kv_head, d_k_tile, C.HEAD_DIM, C.BLOCK_D)
    store_keys(d_v, d_v_strides, owned, kv_head, d_v_tile, C.HEAD_DIM_V, C.BLOCK_DV)

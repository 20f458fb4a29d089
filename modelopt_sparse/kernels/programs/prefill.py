"""The prefill kernel: a program attends for some query rows of one head, over the keys of its sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from modelopt_sparse.kernels.device.run_time import RUN_TIME
from modelopt_sparse.kernels.device.scores import grid_pointers, load_rows, pages_of
from modelopt_sparse.kernels.device.sequence import (
    find_sequence,
    first_key_of,
    first_position,
    is_left_out,
    program_place,
    row_limits,
)
from modelopt_sparse.kernels.device.softmax import LOG2_E, finish
from modelopt_sparse.kernels.device.visits import (
    block_limits,
    list_limits,
    row_tile_limits,
    tile_limits,
)
from modelopt_sparse.kernels.stages.skip import row_tile_of_rows

from .attend import attend


@triton.jit(do_not_specialize=RUN_TIME)
def prefill_kernel(
    q, k, v, out, lse, k_boxes, v_boxes, box_rows, box_page_rows, box_columns, v_box_columns,
    q_strides, k_strides, v_strides, out_strides,
    k_table, v_table, k_table_stride, v_table_stride, k_page_stride, v_page_stride,
    q_start, q_len, k_start, k_len, n_sequences, n_super_blocks, n_heads, group,
    bounds, window,
    mask, mask_row_start, mask_key_start, mask_item, mask_head, mask_row, mask_key,
    bias, bias_row_start, bias_key_start, bias_item, bias_head, bias_row, bias_key,
    sinks, scale, softcap, v_scale,
    num_sink_tokens, dense_window_size,
    log2_threshold, log2_thresholds, threshold_strides, count_thresholds, counts,
    words, n_words, lists, tags, list_lengths, list_stride,
    dropped_bound, dropped,
    C: tl.constexpr,
):  # fmt: skip
    """One program: C.BLOCK_M positions of one query head.

    Tensors are those of `attention_varlen`; strides are (token, head), those of grids all four. `counts` is
    int64 [2 + thresholds, Hq]: visible, skipped, and skipped under each further threshold. `k_boxes` and
    `v_boxes`, and what a head and a page add to their coordinates, are those of `boxes`, for C.BOXES.
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
    position = start + tl.arange(0, C.BLOCK_M)
    is_row = (position >= first) & (position < first + n_q)
    row = tl.load(q_start + sequence) + position - first
    first_row = tl.maximum(start, first)
    last_row = tl.minimum(start + C.BLOCK_M, first + n_q) - 1
    if first_row > last_row:
        return
    low, high = row_limits(position, row, is_row, n_k, bounds, window, C.CAUSAL, C.HAS_BOUNDS)
    limits = block_limits(low, high, is_row, first_row, last_row, n_k, window, C)

    kv_head = head // group
    first_key = first_key_of(k_start, sequence, C)
    k_pages = pages_of(k_table, k_table_stride, k_page_stride, sequence, C)
    v_pages = pages_of(v_table, v_table_stride, v_page_stride, sequence, C)
    k_token, k_head = k_strides
    v_token, v_head = v_strides
    k += first_key * k_token + kv_head.to(tl.int64) * k_head
    v += first_key * v_token + kv_head.to(tl.int64) * v_head
    q_token, q_head = q_strides
    q += head.to(tl.int64) * q_head
    q_tile = load_rows(q, q_token, row, is_row, C.HEAD_DIM, C.BLOCK_D)
    if C.UPCAST:
        q_tile = q_tile.to(tl.float32)
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

    top, bottom, full_top, full_bottom = tile_limits(
        limits, first_row, num_sink_tokens, dense_window_size, C
    )
    n_visits = tl.maximum(top - bottom + 1, 0)
    n_full = tl.maximum(full_top - full_bottom + 1, 0)
    n_edge = tl.where(n_full > 0, top - full_top, n_visits)
    order = (top, bottom, 0, 0)
    visit = top * 0
    group_of_row = row_tile_of_rows(C.BLOCK_M, C.GROUPS)
    last = group_of_row
    first_tile = group_of_row
    # Pointers that a variant has no use for: never read, but Triton wants them to have a type.
    given = (q_len, q_len)
    tile_words = (q_len, 0)
    slot = super_block * PARTS + block % PARTS
    if C.GIVEN:
        place = slot.to(tl.int64) * n_heads + head
        given = (lists + place * list_stride, tags + place * list_stride)
        n_visits = tl.load(list_lengths + place)
        visit, n_edge, full_stop, n_visits = list_limits(
            given[0], n_visits, top, full_top, full_bottom, bottom
        )
        n_full = full_stop - n_edge
    if C.SKIP:
        last, first_tile, least_last, greatest_first = row_tile_limits(
            low, high, top, bottom, start, first_row, last_row, n_k, window, group_of_row, grids, C
        )  # fmt: skip
        n_last = tl.minimum(top - least_last + 1, n_visits)
        n_first = tl.where(top > bottom, greatest_first - bottom + 1, 0)
        order = (top, bottom, n_last, n_first)
        n_visits = tl.maximum(n_last + n_first + top - bottom - 1, n_last)
        full_top = tl.minimum(full_top, least_last - 1)
        full_bottom = tl.maximum(full_bottom, greatest_first + 1)
        n_full = tl.maximum(full_top - full_bottom + 1, 0)
        n_edge = tl.where(n_full > 0, n_last + n_first + top - 1 - full_top, n_visits)
        if C.GROUPS == 1 and not C.HAS_LOWER_EDGE:
            # One row tile has one last and one first tile, and the first is as visible as those after it.
            joins = tl.where((n_full > 0) & (n_edge == 2), 1, 0)
            n_edge -= joins
            n_full += joins
        if C.STORE_TILES:
            tile_words = (
                words + (slot.to(tl.int64) * C.GROUPS * n_heads + head) * n_words,
                n_heads * n_words,
            )
        if log2_thresholds is not None:
            by_sequence, by_head = threshold_strides
            log2_threshold = tl.load(log2_thresholds + sequence * by_sequence + head * by_head)
    below = 0
    if C.THRESHOLDS > 0:
        below = tl.full([C.THRESHOLDS], 0, tl.int32)

    first_seen, stop_seen, full_low, full_high = limits
    rows = (position, low, high, is_row, group_of_row, first_seen, stop_seen, full_low > full_high)
    visits = (order, last, first_tile)
    box_row = first_key.to(tl.int32) + kv_head * box_rows
    k_box = (k_boxes, box_row, box_page_rows, kv_head * box_columns)
    v_box = (v_boxes, box_row, box_page_rows, kv_head * v_box_columns)
    kv = (k, v, k_token, v_token, k_box, v_box, k_pages, v_pages, None)
    numbers = (n_k, factor, scale_log2, softcap, (num_sink_tokens, dense_window_size))
    histogram = (q_len, False, 0)
    if C.HISTOGRAM:
        this_head = tl.arange(0, 1)
        first_bin = counts + (2 + C.THRESHOLDS) * n_heads + head
        histogram = (first_bin + this_head, this_head == 0, n_heads)
    skipping = (log2_threshold, count_thresholds, histogram)
    none = tl.full([C.BLOCK_M], 0.0, tl.float32)
    tally = super_block * 0
    state = (
        tl.full([C.BLOCK_M, C.BLOCK_DV], 0.0, tl.float32), none, none - float("inf"), none, none,
        (tally, tally, below, tl.full([C.GROUPS], 0, tl.int32)),
    )  # fmt: skip
    state = attend(
        state, visit, n_edge, q_tile, kv, rows, visits, given, tile_words, grids, numbers, skipping, C, True
    )  # fmt: skip
    if not C.ONLY_EDGES:
        n_inner = n_edge + n_full
        state = attend(
            state, n_edge, n_inner, q_tile, kv, rows, visits, given, tile_words, grids, numbers, skipping,
            C, False,
        )  # fmt: skip
        if C.HAS_LOWER_EDGE:
            state = attend(
                state, n_inner, n_visits, q_tile, kv, rows, visits, given, tile_words, grids, numbers,
                skipping, C, True,
            )  # fmt: skip

    acc, total, running, bound, lost, tallies = state
    sink = 0.0
    if C.HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
    values, row_lse, kept_sum, rescaled = finish(
        acc, total, running, lost, sink, v_scale, C.HAS_SINKS, C.EXACT
    )
    out_token, out_head = out_strides
    channel = tl.arange(0, C.BLOCK_DV)
    pointers = (
        out
        + head.to(tl.int64) * out_head
        + row.to(tl.int64)[:, None] * out_token
        + channel[None, :]
    )
    tl.store(
        pointers,
        values.to(out.dtype.element_ty),
        mask=is_row[:, None] & (channel < C.HEAD_DIM_V)[None, :],
    )
    entry = row.to(tl.int64) * n_heads + head
    tl.store(lse + entry, row_lse, mask=is_row)
    if C.SKIP:
        visible_tiles, skipped_tiles, below, _ = tallies
        tl.atomic_add(counts + head, visible_tiles.to(tl.int64), sem="relaxed")
        tl.atomic_add(counts + n_heads + head, skipped_tiles.to(tl.int64), sem="relaxed")
        if C.THRESHOLDS > 0:
            place = (2 + tl.arange(0, C.THRESHOLDS)) * n_heads + head
            tl.atomic_add(counts + place, below.to(tl.int64), sem="relaxed")
        bound *= rescaled
        share = bound / (kept_sum + bound)
        tl.store(dropped_bound + entry, tl.where(bound > 0, share, 0.0), mask=is_row)
        if C.WEIGH_SKIPPED:
            lost *= rescaled
            tl.store(
                dropped + entry, tl.where(lost > 0, lost / (kept_sum + lost), 0.0), mask=is_row
            )

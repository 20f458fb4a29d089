"""The decode kernel: a program attends for the rows of a sequence, in heads that share a KV head.

It visits the key tiles of one split; the sums of all splits are added up by `merge_kernel`. All its rows
vote together, over segments of key tiles that begin from the same seed. Source: BLASST (arXiv 2512.12087);
splits: Flash-Decoding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from modelopt_sparse.kernels.device.run_time import RUN_TIME
from modelopt_sparse.kernels.device.scores import (
    as_queries,
    columns_to_keys,
    grid_pointers,
    load_box,
    load_k,
    load_rows,
    load_stored,
    load_v,
    pages_at,
    pages_of,
    seen_keys,
    transform,
    visible,
)
from modelopt_sparse.kernels.device.sequence import first_key_of, first_position, row_limits
from modelopt_sparse.kernels.device.softmax import LOG2_E, rescale
from modelopt_sparse.kernels.device.visits import block_limits, seen_tiles, tile_limits
from modelopt_sparse.kernels.stages.skip import add_to_histogram, count_skipped, vote

from .merge import store_finished

_FAR = tl.constexpr(2**30)


@triton.jit
def seen_scores(q, tile, pages, kv, rows, grids, numbers, C: tl.constexpr, IS_EDGE: tl.constexpr):
    """Scores of a tile, and each row's largest.

    Args:
        IS_EDGE: a row may not see a key; else all rows see all keys.
        q: ([BLOCK_M, BLOCK_D], [BLOCK_M, BLOCK_REST]), the second for C.REST > 0: a head dim that is two
            powers of two costs less as two products than as the next power.

    Returns:
        scores [BLOCK_M, BLOCK_N], times `factor` log2; -inf where a row doesn't see a key.
        largest [BLOCK_M] log2; inf where a score is NaN.
        k_tile: the keys [BLOCK_N, BLOCK_D], without the rest of their channels.
    """
    low, high, is_row, first_key, stop_key, _has_gaps = rows
    mask, bias = grids
    n_k, factor, scale_log2, softcap = numbers
    keys = tile * C.BLOCK_N + columns_to_keys(C)
    is_key = (keys >= first_key) & (keys < stop_key)
    BY_BOX: tl.constexpr = C.BOXES and not IS_EDGE
    shown = is_key if IS_EDGE else None
    k_tile = as_queries(load_k(kv, tile, pages, shown, C, BY_BOX), C)
    scores = tl.dot(q[0], tl.trans(k_tile), input_precision=C.PRECISION)
    if C.REST > 0:
        rest = as_queries(load_rest(kv, tile, pages, shown, C, BY_BOX), C)
        scores = tl.dot(q[1], tl.trans(rest), scores, input_precision=C.PRECISION)
    scores = transform(scores, keys, n_k, is_row, bias, scale_log2, softcap, C)
    if IS_EDGE:
        seen = visible(keys, low, high, is_row, mask, bias, C)
        scores = tl.where(seen, scores, float("-inf"))
    # The max of numbers and a NaN is a number: a tile must not be skipped that has one.
    largest = tl.max(tl.where(scores == scores, scores, float("inf")), 1) * factor
    return scores, largest, k_tile


@triton.jit
def load_rest(kv, tile, pages, shown, C: tl.constexpr, BY_BOX: tl.constexpr):
    """The channels of keys behind the first HEAD_DIM, as `load_v` loads values: [BLOCK_N, BLOCK_REST]."""
    k, v, k_stride, v_stride, k_box, v_box, k_pages, v_pages, rest_box = kv
    if BY_BOX:
        return load_box(rest_box, pages[0], tile, C)
    return load_stored(
        k + C.HEAD_DIM, k_stride, k_pages[1], pages[0], tile, shown, C, C.REST, C.BLOCK_REST
    )


@triton.jit
def seed_of_rows(q, top, bottom, kv, rows, grids, numbers, C: tl.constexpr):
    """The largest log2 score of each row's own last and first visible tile: [BLOCK_M]."""
    low, high = rows[0], rows[1]
    sees = high > low
    last = tl.where(sees, (high + C.BLOCK_N - 1) // C.BLOCK_N - 1, -1)
    first = tl.where(sees, low // C.BLOCK_N, _FAR)
    if C.HAS_GRIDS:
        last, first = seen_tiles(low, high, sees, top, bottom, grids, C)
    greatest_last = tl.max(last, 0)
    least_last = tl.min(tl.where(last >= 0, last, _FAR), 0)
    least_first = tl.min(first, 0)
    greatest_first = tl.max(tl.where(first < _FAR, first, -1), 0)
    n_last = tl.maximum(greatest_last - least_last + 1, 0)
    n_first = tl.maximum(greatest_first - least_first + 1, 0)
    seed = tl.full([C.BLOCK_M], float("-inf"), tl.float32)
    for visit in tl.range(0, n_last + n_first, num_stages=C.STAGES):
        tile = tl.where(visit < n_last, greatest_last - visit, least_first + visit - n_last)
        pages = pages_at(kv, tile, rows[4], C)
        _scores, largest, _k_tile = seen_scores(q, tile, pages, kv, rows, grids, numbers, C, True)
        seed = tl.maximum(seed, tl.where((tile == last) | (tile == first), largest, float("-inf")))
    return seed


@triton.jit
def attend_decode(
    state, top, bottom, q, kv, rows, grids, numbers, skipping, words,
    C: tl.constexpr, IS_EDGE: tl.constexpr,
):  # fmt: skip
    """Attends to the key tiles from `top` down to `bottom`, whose decisions begin anew in each segment.

    Args:
        state: (acc [BLOCK_M, BLOCK_DV], total, running, bound, lost, local [BLOCK_M], tallies): as for
            `attend`, and the largest score since the segment began.
        rows: (low, high, is_row [BLOCK_M], first_key, stop_key, has_gaps), as for `attend`.
        skipping: (seed, log2(lambda) [BLOCK_M], further thresholds [THRESHOLDS], histogram, tiles of a
            segment).
        words: (pointers [HEADS], which exist, first tile): where the decisions of each head are stored.
        IS_EDGE: as for `seen_scores`.
    Returns:
        state.
    """
    acc, total, running, bound, lost, local, tallies = state
    visible_tiles, skipped_tiles, below, word = tallies
    low, high, is_row, first_key, stop_key, has_gaps = rows
    factor = numbers[1]
    seed, threshold, counted, histogram, segment_tiles = skipping
    group = tl.arange(0, C.BLOCK_M) * 0
    # At edges there is little to load ahead, unless all tiles are.
    STAGES: tl.constexpr = 1 if IS_EDGE and not C.ONLY_EDGES else C.STAGES
    pages = pages_at(kv, top, stop_key, C)
    for visit in tl.range(0, top - bottom + 1, num_stages=STAGES):
        tile = top - visit
        keys = tile * C.BLOCK_N + columns_to_keys(C)
        is_key = (keys >= first_key) & (keys < stop_key)
        scores, tile_max, k_tile = seen_scores(q, tile, pages, kv, rows, grids, numbers, C, IS_EDGE)
        any_kept = True
        if C.SKIP:
            local = tl.where((tile + 1) % segment_tiles == 0, seed, local)
            # After a NaN nothing is known to lie below it.
            known = tl.where(local == float("inf"), float("-inf"), local)
            kept, seen = vote(tile_max, known, threshold, is_row, group)
            any_kept = kept != 0
            visible_tiles += seen
            skipped_tiles += seen - kept
            if C.THRESHOLDS > 0:
                below = count_skipped(
                    tile_max, known, counted, is_row, group, below, 1, C.THRESHOLDS
                )
            if C.HISTOGRAM:
                add_to_histogram(tile_max, known, is_row, group, histogram, 1)
            if C.STORE_TILES:
                word = word | (kept << (tile & 31))
                if ((tile & 31) == 0) | (tile == words[2]):
                    tl.store(words[0] + (tile >> 5), word, mask=words[1])
                    word = 0
            local = tl.maximum(local, tile_max)

        if any_kept:
            is_seen = None
            if IS_EDGE:
                is_seen = seen_keys(keys, is_key, low, high, is_row, has_gaps, grids, C)
            if not C.V_IN_K:
                values = as_queries(load_v(kv, tile, pages, is_seen, C, C.BOXES and not IS_EDGE), C)
            elif IS_EDGE and (C.HAS_GRIDS or C.HAS_BOUNDS):
                values = tl.where(is_seen[:, None], k_tile, 0.0).to(k_tile.dtype)
            else:
                values = k_tile
            running, pivot, alpha = rescale(running, tile_max)
            p = tl.exp2(scores * factor - pivot[:, None])
            acc *= alpha[:, None]
            acc = tl.dot(p.to(values.dtype), values, acc, input_precision=C.PRECISION)
            total = total * alpha + tl.sum(p, 1)
            if C.SKIP:
                bound *= alpha
                lost *= alpha
        elif C.SKIP:
            # -inf minus -inf where a row sees nothing.
            pivot = tl.where(running == float("-inf"), 0.0, running)
            bound += C.BLOCK_N * tl.exp2(tile_max - pivot)
            if C.WEIGH_SKIPPED:
                lost += tl.sum(tl.exp2(scores * factor - pivot[:, None]), 1)
        if C.PAGE > 0:
            pages = pages_at(kv, tl.maximum(tile - 1, bottom), stop_key, C)
    return acc, total, running, bound, lost, local, (visible_tiles, skipped_tiles, below, word)


@triton.jit
def store_split(split, acc, total, running, bound, lost, parts, C: tl.constexpr):
    """Stores what rows come to in a split, for `merge_kernel`.

    Args:
        parts: (split_sums, split_out, n_entries, entry [BLOCK_M] of each row, is_row [BLOCK_M]).
    """
    split_sums, split_out, n_entries, entry, is_row = parts
    part = split.to(tl.int64) * n_entries + entry
    sums = split_sums + part * 4
    tl.store(sums, running, mask=is_row)
    tl.store(sums + 1, total, mask=is_row)
    if C.SKIP:
        tl.store(sums + 2, bound, mask=is_row)
        tl.store(sums + 3, lost, mask=is_row)
    channel = tl.arange(0, C.BLOCK_DV)
    pointers = split_out + part[:, None] * C.HEAD_DIM_V + channel[None, :]
    tl.store(pointers, acc, mask=is_row[:, None] & (channel < C.HEAD_DIM_V)[None, :])


@triton.jit(do_not_specialize=RUN_TIME)
def decode_kernel(
    q, k, v, out, lse, seeds, split_sums, split_out,
    k_boxes, v_boxes, rest_boxes, box_rows, box_page_rows, box_columns, v_box_columns, rest_box_columns,
    q_strides, k_strides, v_strides, out_strides,
    k_table, v_table, k_table_stride, v_table_stride, k_page_stride, v_page_stride,
    q_start, q_len, k_start, k_len, n_heads, group, n_members, n_blocks, max_q, n_splits, short_tiles,
    long_tiles, long_keys, n_entries,
    bounds, window,
    mask, mask_row_start, mask_key_start, mask_item, mask_head, mask_row, mask_key,
    bias, bias_row_start, bias_key_start, bias_item, bias_head, bias_row, bias_key,
    sinks, scale, softcap, v_scale,
    log2_threshold, log2_thresholds, threshold_strides, count_thresholds, counts, segment_tiles,
    words, n_words, dropped_bound, dropped,
    C: tl.constexpr,
):  # fmt: skip
    """One program: C.BLOCK_M rows of `n_members` query heads of one KV head of a sequence, and one split.

    Tensors are as for `prefill_kernel`, but `words` is int32 [B, Hq, n_words].

    Args:
        seeds: fp32 [B, max_q, Hq], where the running max of each row begins; written by a launch of its
            own, C.ONLY_SEEDS.
        split_sums, split_out: see `merge_kernel`; for C.IS_SPLIT.
        n_members: query heads of a program: all of a group, or one that votes alone.
        n_blocks: programs that share the rows of these heads; 1 where tiles are skipped.
        max_q: rows of a sequence at most.
        short_tiles, long_tiles: key tiles of a split, the second for sequences of `long_keys` keys or more.
            Segments and words of decisions end where splits do.
        n_entries: see `merge_kernel`.
        k_boxes, v_boxes, rest_boxes: for C.BOXES, as for `prefill_kernel`; of the first channels of keys,
            of values, and of the rest.
    """
    pid = tl.program_id(0)
    block = pid % n_blocks
    pid = pid // n_blocks
    split = pid % n_splits
    pid = pid // n_splits
    n_units = n_heads // n_members
    first_head = pid % n_units * n_members
    sequence = pid // n_units
    n_q = tl.load(q_len + sequence)
    if C.ALL_DECODE:
        if n_q == 0:
            return
    elif n_q != 1:
        return
    n_k = tl.load(k_len + sequence)
    split_tiles = tl.where(n_k < long_keys, short_tiles, long_tiles)
    first_tile = split * split_tiles
    if split > 0:
        if first_tile * C.BLOCK_N >= n_k:
            return

    # Rows of one head lie together.
    place = block * C.BLOCK_M + tl.arange(0, C.BLOCK_M)
    index = place % max_q
    head = first_head + place // max_q
    is_row = (place < n_members * max_q) & (index < n_q)
    first = first_position(n_q, n_k, C.CAUSAL)
    position = first + index
    row = tl.load(q_start + sequence) + index
    low, high = row_limits(position, row, is_row, n_k, bounds, window, C.CAUSAL, C.HAS_BOUNDS)
    limits = block_limits(low, high, is_row, first, first + n_q - 1, n_k, window, C)
    top, bottom, full_top, full_bottom = tile_limits(limits, first, 0, 0, C)
    first_key, stop_key, full_low, full_high = limits

    kv_head = (first_head // group).to(tl.int64)
    key = first_key_of(k_start, sequence, C)
    k_pages = pages_of(k_table, k_table_stride, k_page_stride, sequence, C)
    v_pages = pages_of(v_table, v_table_stride, v_page_stride, sequence, C)
    k_token, k_head = k_strides
    v_token, v_head = v_strides
    k += key * k_token + kv_head * k_head
    v += key * v_token + kv_head * v_head
    q_token, q_head = q_strides
    each_head = head.to(tl.int64)[:, None]
    q_tile = load_rows(q + each_head * q_head, q_token, row, is_row, C.HEAD_DIM, C.BLOCK_D)
    q_rest = q_tile
    if C.REST > 0:
        rest = q + C.HEAD_DIM + each_head * q_head
        q_rest = load_rows(rest, q_token, row, is_row, C.REST, C.BLOCK_REST)
    if C.UPCAST:
        q_tile = q_tile.to(tl.float32)
        q_rest = q_rest.to(tl.float32)
    q_tile = (q_tile, q_rest)
    mask_pointers = grid_pointers(
        mask, mask_row_start, mask_key_start, mask_item, mask_head, mask_row, mask_key,
        sequence, each_head, index, C.HAS_MASK,
    )  # fmt: skip
    bias_pointers = grid_pointers(
        bias, bias_row_start, bias_key_start, bias_item, bias_head, bias_row, bias_key,
        sequence, each_head, index, C.HAS_BIAS,
    )  # fmt: skip
    grids = ((mask_pointers, mask_key), (bias_pointers, bias_key))

    scale_log2 = scale * LOG2_E
    factor = scale_log2 if C.IS_RAW else 1.0
    box_row = key.to(tl.int32) + kv_head.to(tl.int32) * box_rows
    column = kv_head.to(tl.int32)
    k_box = (k_boxes, box_row, box_page_rows, column * box_columns)
    rest_box = (rest_boxes, box_row, box_page_rows, column * rest_box_columns)
    v_box = (v_boxes, box_row, box_page_rows, column * v_box_columns)
    kv = (k, v, k_token, v_token, k_box, v_box, k_pages, v_pages, rest_box)
    rows = (low, high, is_row, first_key, stop_key, full_low > full_high)
    numbers = (n_k, factor, scale_log2, softcap)
    entry = (sequence.to(tl.int64) * max_q + index) * n_heads + head
    if C.ONLY_SEEDS:
        seed = seed_of_rows(q_tile, top, bottom, kv, rows, grids, numbers, C)
        tl.store(seeds + entry, seed, mask=is_row)
    else:
        seed = tl.full([C.BLOCK_M], float("-inf"), tl.float32)
        threshold = seed
        members = first_head + tl.arange(0, C.HEADS)
        is_member = tl.arange(0, C.HEADS) < n_members
        tile_words = q_len
        if C.SKIP:
            seed = tl.load(seeds + entry, mask=is_row, other=float("-inf"))
            if log2_thresholds is not None:
                by_sequence, by_head = threshold_strides
                of_row = sequence * by_sequence + head * by_head
                threshold = tl.load(log2_thresholds + of_row, mask=is_row, other=0.0)
            else:
                threshold = tl.full([C.BLOCK_M], 0.0, tl.float32) + log2_threshold
            if C.STORE_TILES:
                tile_words = words + (sequence.to(tl.int64) * n_heads + members) * n_words
        histogram = (q_len, False, 0)
        if C.HISTOGRAM:
            histogram = (counts + (2 + C.THRESHOLDS) * n_heads + members, is_member, n_heads)
        skipping = (seed, threshold, count_thresholds, histogram, segment_tiles)
        last_tile = first_tile + split_tiles - 1
        bottom = tl.maximum(bottom, first_tile)
        top = tl.minimum(top, last_tile)
        full_bottom = tl.maximum(full_bottom, first_tile)
        full_top = tl.minimum(full_top, last_tile)
        # Where no tile is fully visible, all are the first loop's.
        full_top = tl.where(full_top < full_bottom, bottom - 1, full_top)
        full_bottom = tl.minimum(full_bottom, full_top + 1)
        below = 0
        if C.THRESHOLDS > 0:
            below = tl.full([C.THRESHOLDS], 0, tl.int32)
        none = tl.full([C.BLOCK_M], 0.0, tl.float32)
        tally = top * 0
        state = (
            tl.full([C.BLOCK_M, C.BLOCK_DV], 0.0, tl.float32), none,
            # A row's largest score is never skipped, so a row that starts at its seed ends at that score.
            seed, none, none, seed, (tally, tally, below, tally),
        )  # fmt: skip
        head_words = (tile_words, is_member, bottom)
        state = attend_decode(
            state, top, full_top + 1, q_tile, kv, rows, grids, numbers, skipping, head_words,
            C, True,
        )  # fmt: skip
        if not C.ONLY_EDGES:
            state = attend_decode(
                state, full_top, full_bottom, q_tile, kv, rows, grids, numbers, skipping, head_words,
                C, False,
            )  # fmt: skip
            if C.HAS_LOWER_EDGE:
                state = attend_decode(
                    state, full_bottom - 1, bottom, q_tile, kv, rows, grids, numbers, skipping, head_words,
                    C, True,
                )  # fmt: skip
        acc, total, running, bound, lost, _local, tallies = state
        if C.IS_SPLIT:
            parts = (split_sums, split_out, n_entries, entry, is_row)
            store_split(split, acc, total, running, bound, lost, parts, C)
        else:
            sink = 0.0
            if C.HAS_SINKS:
                sink = tl.load(sinks + head, mask=is_row, other=0.0).to(tl.float32) * LOG2_E
            store_finished(
                acc, total, running, bound, lost, sink, v_scale, row, head, is_row,
                tl.arange(0, C.BLOCK_DV), n_heads, out, out_strides, lse, dropped_bound, dropped, C,
            )  # fmt: skip
        if C.SKIP:
            visible_tiles, skipped_tiles, below, _word = tallies
            # Heads that vote together have the same tiles.
            zeros = tl.full([C.HEADS], 0, tl.int64)
            if counts is not None:
                of_head = counts + members
                tl.atomic_add(of_head, zeros + visible_tiles, mask=is_member, sem="relaxed")
                tl.atomic_add(
                    of_head + n_heads, zeros + skipped_tiles, mask=is_member, sem="relaxed"
                )
            if C.THRESHOLDS > 0:
                further_one = tl.arange(0, C.THRESHOLDS)[None, :]
                further = counts + (2 + further_one) * n_heads + members[:, None]
                # A mask of the full shape: Triton's interpreter misreads one that is broadcast.
                exists = is_member[:, None] & (further_one >= 0)
                tl.atomic_add(further, zeros[:, None] + below[None, :], mask=exists, sem="relaxed")

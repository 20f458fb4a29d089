"""The prefill kernel for Hopper: two warpgroups of 64 rows each, and a warp that fetches keys and values.

Each warpgroup is a row tile of the decision grid, and decides for itself.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from modelopt_sparse.kernels.device.run_time import RUN_TIME

from .attend import Block, Results, Rule, attend_rows
from .common import wait_for_all
from .fetch import Source, fetch, fetch_keys, fetch_queries
from .places import Order, ends_of, find_sequence, limits_of, program_place, tile_of
from .sizes import ATTEND_REGISTERS, CHANNELS, FETCH_REGISTERS, KEYS, ROWS, WARPS, Barriers, Buffers

_LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit(do_not_specialize=RUN_TIME)
def hopper_prefill_kernel(
    q_box, k_box, v_box, q_box_rows, q_box_columns, box_rows, box_page_rows, box_columns, v_box_columns,
    out, lse, out_strides,
    k_table, v_table, k_table_stride, v_table_stride,
    q_start, q_len, k_start, k_len, n_sequences, n_super_blocks, n_heads, group,
    window, sinks, scale_log2, v_scale,
    log2_threshold, log2_thresholds, threshold_strides, counts, words, n_words,
    lists, tags, list_lengths, list_stride,
    dropped_bound, dropped,
    C: gl.constexpr,
):  # fmt: skip
    """One program: 128 positions of one query head, as in `prefill_kernel`, whose arguments these are.

    Args:
        q_box, k_box, v_box: descriptors of 64 channels: of 64 rows, and of 128 keys or of a page.
        box_rows, box_columns: rows from head to head, or channels; box_page_rows: rows from page to page.
    """
    PIECES: gl.constexpr = C.HEAD_DIM // CHANNELS
    STAGES: gl.constexpr = C.STAGES
    dtype: gl.constexpr = q_box.dtype
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    buffers = Buffers(
        gl.allocate_shared_memory(dtype, [2 * PIECES, ROWS, CHANNELS], wide),
        gl.allocate_shared_memory(dtype, [STAGES * PIECES, KEYS, CHANNELS], wide),
        gl.allocate_shared_memory(dtype, [STAGES, KEYS, C.HEAD_DIM_V], wide),
    )
    barriers = Barriers(
        gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
    )
    for half in gl.static_range(2):
        mbarrier.init(barriers.queries_there.index(half), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.keys_there.index(stage), count=1)
        mbarrier.init(barriers.keys_free.index(stage), count=2)
        mbarrier.init(barriers.values_there.index(stage), count=1)
        mbarrier.init(barriers.values_free.index(stage), count=2)
    mbarrier.init(barriers.arrived, count=1)
    fence_async_shared()
    wait_for_all()

    head, super_block = program_place(gl.program_id(0), n_super_blocks, n_heads)
    given = (q_len, q_len)
    n_visits = head * 0
    if C.GIVEN:
        place = super_block.to(gl.int64) * n_heads + head
        given = (lists + place * list_stride, tags + place * list_stride)
        n_visits = gl.load(list_lengths + place)
    sequence, number = find_sequence(super_block, q_len, k_len, n_sequences, C.CAUSAL)
    if sequence >= n_sequences:
        return
    n_q = gl.load(q_len + sequence)
    n_k = gl.load(k_len + sequence)
    first_row = gl.load(q_start + sequence)
    kv_head = head // group
    kv_row = kv_head * box_rows
    tables = (q_len, q_len)
    if C.PAGE > 0:
        tables = (
            k_table + sequence.to(gl.int64) * k_table_stride,
            v_table + sequence.to(gl.int64) * v_table_stride,
        )
    else:
        kv_row += gl.load(k_start + sequence)
    if C.ONLY_PREFILL:
        if n_q == 1:
            return
    first = n_q * 0
    if C.CAUSAL:
        first = n_k - n_q
    start = ((first >> 7) + number) * 128
    begin = gl.maximum(start, first)
    last_row = gl.minimum(start + 128, first + n_q) - 1
    if begin > last_row:
        return
    # The first copies, for the warp that fetches begins later.
    fetch_queries(
        q_box, buffers.q, barriers.queries_there,
        first_row + start - first + head * q_box_rows, head * q_box_columns, C,
    )  # fmt: skip

    first_key, full_high = limits_of(begin, n_k, window, C.CAUSAL)
    full_low, stop_key = limits_of(last_row, n_k, window, C.CAUSAL)
    top = (stop_key + KEYS - 1) // KEYS - 1
    bottom = first_key // KEYS
    full_top = gl.minimum(full_high // KEYS - 1, top)
    full_bottom = gl.maximum((full_low + KEYS - 1) // KEYS, bottom)
    last_0, first_0 = ends_of(start, first, last_row, top, bottom, n_k, window, C)
    last_1, first_1 = ends_of(start + ROWS, first, last_row, top, bottom, n_k, window, C)
    n_last = top * 0
    n_first = top * 0
    threshold = log2_threshold
    if not C.GIVEN:
        n_visits = gl.maximum(top - bottom + 1, 0)
    if C.SKIP:
        least_last = gl.minimum(last_0, last_1)
        greatest_first = gl.maximum(first_0, first_1)
        n_last = gl.minimum(top - least_last + 1, n_visits)
        n_first = gl.where(top > bottom, greatest_first - bottom + 1, 0)
        n_visits = gl.maximum(n_last + n_first + top - bottom - 1, n_last)
        full_top = gl.minimum(full_top, least_last - 1)
        full_bottom = gl.maximum(full_bottom, greatest_first + 1)
        if log2_thresholds is not None:
            by_sequence, by_head = threshold_strides
            threshold = gl.load(log2_thresholds + sequence * by_sequence + head * by_head)
    order = Order(top, bottom, n_last, n_first, given)
    k_source = Source(
        k_box, kv_row, kv_head * box_columns, tables[0], box_page_rows, first_key, stop_key
    )
    v_source = Source(
        v_box, kv_row, kv_head * v_box_columns, tables[1], box_page_rows, first_key, stop_key
    )
    if n_visits > 0:
        fetch_keys(k_source, tile_of(0, order, C), 0, buffers, barriers, C)

    tile_words = (q_len, q_len)
    if C.STORE_TILES:
        of_block = words + (super_block.to(gl.int64) * 2 * n_heads + head) * n_words
        tile_words = (of_block, of_block + n_heads * n_words)
    sink = 0.0
    if C.HAS_SINKS:
        sink = gl.load(sinks + head).to(gl.float32) * _LOG2_E
    ends = ((last_0, first_0), (last_1, first_1))
    block = Block(
        start, first, n_q, n_k, window, first_row, n_visits, full_top, full_bottom, ends
    )  # fmt: skip
    rule = Rule(scale_log2, threshold, tile_words)
    out_token, out_head = out_strides
    results = Results(
        out, out_token, out_head, lse, counts, dropped_bound, dropped, head, n_heads, sink, v_scale
    )
    gl.warp_specialize(
        [
            (attend_rows, (block, order, rule, buffers, barriers, results, gl.constexpr(0), C)),
            (attend_rows, (block, order, rule, buffers, barriers, results, gl.constexpr(1), C)),
            (fetch, (k_source, v_source, order, n_visits, buffers, barriers, C)),
        ],
        [WARPS, 1],
        [ATTEND_REGISTERS, FETCH_REGISTERS],
    )

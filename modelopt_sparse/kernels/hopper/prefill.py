"""The prefill kernel for Hopper: two warpgroups of 64 rows each, and a warp that fetches keys and values.

Each warpgroup is a row tile of the decision grid, and decides for itself.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from modelopt_sparse.kernels.device.run_time import RUN_TIME

from .attend import Block, Rule, attend_rows
from .fetch import Source, fetch, fetch_keys, fetch_queries
from .places import find_sequence, program_place, tile_of, visits_of
from .shared import allocate
from .sizes import (
    ATTEND_REGISTERS,
    FETCH_REGISTERS,
    WARPS,
    WIDE_ATTEND_REGISTERS,
    WIDE_FETCH_REGISTERS,
)
from .store import Targets

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
    buffers, barriers = allocate(q_box.dtype, C)
    head, super_block = program_place(gl.program_id(0), n_super_blocks, n_heads)
    sequence, number = find_sequence(super_block, q_len, k_len, n_sequences, C.CAUSAL)
    if sequence >= n_sequences:
        return
    n_q = gl.load(q_len + sequence)
    n_k = gl.load(k_len + sequence)
    first_row = gl.load(q_start + sequence)
    first = n_q * 0
    if C.CAUSAL:
        first = n_k - n_q
    start = ((first >> 7) + number) * 128
    LEAST: gl.constexpr = 2 if C.ONLY_PREFILL else 1
    if (n_q < LEAST) | (start >= first + n_q):
        return
    # The first copies, for the warp that fetches begins later.
    fetch_queries(
        q_box, buffers.q, barriers.queries_there,
        first_row + start - first + head * q_box_rows, head * q_box_columns, C,
    )  # fmt: skip

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
    given = (q_len, q_len)
    n_given = head * 0
    if C.GIVEN:
        place = super_block.to(gl.int64) * n_heads + head
        given = (lists + place * list_stride, tags + place * list_stride)
        n_given = gl.load(list_lengths + place)
    visits = visits_of(start, first, n_q, n_k, window, given, n_given, C)
    k_source = Source(
        k_box, kv_row, kv_head * box_columns, tables[0], box_page_rows,
        visits.first_key, visits.stop_key,
    )  # fmt: skip
    v_source = Source(
        v_box, kv_row, kv_head * v_box_columns, tables[1], box_page_rows,
        visits.first_key, visits.stop_key,
    )  # fmt: skip
    if visits.n > 0:
        fetch_keys(k_source, tile_of(0, visits, C), 0, buffers, barriers, C)

    threshold = log2_threshold
    if C.SKIP:
        if log2_thresholds is not None:
            by_sequence, by_head = threshold_strides
            threshold = gl.load(log2_thresholds + sequence * by_sequence + head * by_head)
    tile_words = (q_len, q_len)
    if C.STORE_TILES:
        of_block = words + (super_block.to(gl.int64) * 2 * n_heads + head) * n_words
        tile_words = (of_block, of_block + n_heads * n_words)
    sink = 0.0
    if C.HAS_SINKS:
        sink = gl.load(sinks + head).to(gl.float32) * _LOG2_E
    block = Block(start, first, n_q, n_k, window, first_row)
    rule = Rule(scale_log2, threshold, tile_words)
    out_token, out_head = out_strides
    targets = Targets(
        out, out_token, out_head, lse, counts, dropped_bound, dropped, head, n_heads, sink, v_scale
    )
    gl.warp_specialize(
        [
            (attend_rows, (block, visits, rule, buffers, barriers, targets, gl.constexpr(0), C)),
            (attend_rows, (block, visits, rule, buffers, barriers, targets, gl.constexpr(1), C)),
            (fetch, (k_source, v_source, visits, buffers, barriers, C)),
        ],
        [WARPS, 1],
        [
            WIDE_ATTEND_REGISTERS if C.IS_WIDE else ATTEND_REGISTERS,
            WIDE_FETCH_REGISTERS if C.IS_WIDE else FETCH_REGISTERS,
        ],
    )

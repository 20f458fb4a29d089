"""The kernel for dense decode over latents: 64 rows attend to keys that hold their values. Hopper only.

Both warpgroups share the scores of a tile, each computes half of the channels, and two tiles are in flight.
In plain Triton each warpgroup would compute all scores. Source: DeepSeek-V2 (arXiv 2405.04434), FlashMLA.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from modelopt_sparse.kernels.device.run_time import RUN_TIME

# Triton 3.9 has other names for two things.
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier

ROWS = 64
KEYS = 64
_STAGES = gl.constexpr(2)
_ROWS = gl.constexpr(ROWS)
_KEYS = gl.constexpr(KEYS)


@gluon.jit
def ask_for_tile(tile, stage, table, boxes, buffers, arrived, C: gl.constexpr):
    """Starts the copy of a tile of latents into a stage.

    Args:
        boxes: (descriptors of the latent and of the rotary channels, rows from page to page).
        buffers: shared memory [stages, keys, channels] of both. arrived: barriers [stages].
    """
    latents, rotary, page_rows = boxes
    of_latents, of_rotary = buffers
    TILES: gl.constexpr = C.PAGE // _KEYS
    page = gl.load(table + tile // TILES)
    row = page * page_rows + tile % TILES * _KEYS
    barrier = arrived.index(stage)
    mbarrier.expect(barrier, latents.block_type.nbytes + rotary.block_type.nbytes)
    _load(latents, [row, 0], barrier, of_latents.index(stage))
    _load(rotary, [row, 0], barrier, of_rotary.index(stage))


@gluon.jit
def load_queries(q, pointers, is_row, first, buffer, C: gl.constexpr, CHANNELS: gl.constexpr):
    """Copies some channels of the rows into shared memory [rows, CHANNELS]."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    channel = first + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, layout))
    rows = gl.convert_layout(pointers, gl.SliceLayout(1, layout))
    exists = gl.convert_layout(is_row, gl.SliceLayout(1, layout))
    values = gl.load(
        q + gl.expand_dims(rows, 1) + gl.expand_dims(channel, 0),
        mask=gl.expand_dims(exists, 1),
        other=0.0,
    )
    buffer.store(values)


@gluon.jit
def multiply(q_latents, q_rotary, buffers, stage, zero):
    """Starts the products of all rows and the keys of a stage."""
    of_latents, of_rotary = buffers
    product = warpgroup_mma(
        q_latents, of_latents.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
    )
    return warpgroup_mma(q_rotary, of_rotary.index(stage).permute((1, 0)), product, is_async=True)


@gluon.jit
def hide(tile, count, C: gl.constexpr):
    """Clears the values of a tile [keys, channels] but for the first keys: an unused slot may hold NaN."""
    CHANNELS: gl.constexpr = 64
    PARTS: gl.constexpr = C.HEAD_DIM // CHANNELS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    exists = gl.arange(0, _KEYS, layout=gl.SliceLayout(1, layout)) < count
    for i in gl.static_range(PARTS):
        part = tile.slice(i * CHANNELS, CHANNELS, dim=1)
        values = part.load(layout)
        part.store(gl.where(gl.expand_dims(exists, 1), values, 0.0).to(values.dtype))


@gluon.jit(do_not_specialize=RUN_TIME)
def latent_kernel(
    q, latents, rotary, split_sums, split_out, q_token, q_head,
    k_table, k_table_stride, box_page_rows,
    q_start, q_len, k_len, n_heads, n_blocks, max_q, n_splits, short_tiles, long_tiles, long_keys, n_entries,
    scale_log2,
    C: gl.constexpr,
):  # fmt: skip
    """One program: 64 rows of a sequence, and one split, as in `decode_kernel`.

    Args:
        q: [Tq, Hq, D], whose strides are `q_token` and `q_head`.
        latents, rotary: descriptors of the channels of all pages: [rows, HEAD_DIM] and [rows, REST].
        scale_log2: the softmax scale times log2(e).
        The others are those of `decode_kernel`.
    """
    pid = gl.program_id(0)
    block = pid % n_blocks
    pid = pid // n_blocks
    split = pid % n_splits
    sequence = pid // n_splits
    n_q = gl.load(q_len + sequence)
    n_k = gl.load(k_len + sequence)
    if C.ALL_DECODE:
        if n_q == 0:
            return
    elif n_q != 1:
        return
    split_tiles = gl.where(n_k < long_keys, short_tiles, long_tiles)
    first_tile = split * split_tiles
    if split > 0:
        if first_tile * _KEYS >= n_k:
            return
    last_tile = gl.minimum(first_tile + split_tiles, (n_k + _KEYS - 1) // _KEYS) - 1

    scores: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, _KEYS // 2, 16]
    )
    sums: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, C.HEAD_DIM // 2, 16]
    )
    of_score: gl.constexpr = gl.SliceLayout(1, scores)
    of_sum: gl.constexpr = gl.SliceLayout(1, sums)

    # Rows of one head lie together.
    place = block * _ROWS + gl.arange(0, _ROWS, layout=of_score)
    index = place % max_q
    head = place // max_q
    is_row = (place < n_heads * max_q) & (index < n_q)
    high = gl.where(is_row, n_k, 0)
    least_high = n_k
    if C.CAUSAL:
        high = gl.where(is_row, n_k - n_q + index + 1, 0)
        least_high = n_k - n_q + 1

    dtype: gl.constexpr = q.dtype.element_ty
    whole: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_latents = gl.allocate_shared_memory(dtype, [_ROWS, C.HEAD_DIM], whole)
    q_rotary = gl.allocate_shared_memory(dtype, [_ROWS, C.REST], whole)
    of_latents = gl.allocate_shared_memory(dtype, [_STAGES, _KEYS, C.HEAD_DIM], latents.layout)
    of_rotary = gl.allocate_shared_memory(dtype, [_STAGES, _KEYS, C.REST], rotary.layout)
    weights = gl.allocate_shared_memory(dtype, [_ROWS, _KEYS], whole)
    arrived = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    for ahead in gl.static_range(_STAGES):
        mbarrier.init(arrived.index(ahead), count=1)
    fence_async_shared()
    _barrier()

    table = k_table + sequence.to(gl.int64) * k_table_stride
    boxes = (latents, rotary, box_page_rows)
    buffers = (of_latents, of_rotary)
    n_tiles = last_tile - first_tile + 1
    for ahead in gl.static_range(_STAGES):
        if ahead < n_tiles:
            ask_for_tile(first_tile + ahead, ahead, table, boxes, buffers, arrived, C)

    row = gl.load(q_start + sequence) + index
    pointers = row.to(gl.int64) * q_token + head.to(gl.int64) * q_head
    load_queries(q, pointers, is_row, 0, q_latents, C, C.HEAD_DIM)
    load_queries(q, pointers, is_row, C.HEAD_DIM, q_rotary, C, C.REST)
    fence_async_shared()

    running = gl.full([_ROWS], float("-inf"), gl.float32, of_score)
    zero = gl.full([_ROWS, _KEYS], 0.0, gl.float32, scores)
    # Of each place in a tile: rows are added up at the end, for that is an exchange between warpgroups.
    totals = zero
    acc = gl.full([_ROWS, C.HEAD_DIM], 0.0, gl.float32, sums)
    mbarrier.wait(arrived.index(0), 0, pred=n_tiles > 0)
    score = warpgroup_mma_wait(0, deps=(multiply(q_latents, q_rotary, buffers, 0, zero),))
    for visit in range(0, n_tiles):
        stage = visit % _STAGES
        tile = first_tile + visit
        score = score * scale_log2
        if (tile + 1) * _KEYS > least_high:
            key = tile * _KEYS + gl.arange(0, _KEYS, layout=gl.SliceLayout(0, scores))
            seen = gl.expand_dims(key, 0) < gl.expand_dims(high, 1)
            score = gl.where(seen, score, float("-inf"))
        new = gl.maximum(running, gl.max(score, axis=1))
        pivot = gl.where(new == float("-inf"), 0.0, new)
        alpha = gl.exp2(running - pivot)
        p = gl.exp2(score - gl.expand_dims(pivot, 1))
        totals = totals * gl.expand_dims(alpha, 1) + p
        running = new
        weights.store(p.to(dtype))
        if (tile + 1) * _KEYS > n_k:
            hide(of_latents.index(stage), n_k - tile * _KEYS, C)
        fence_async_shared()
        acc = acc * gl.expand_dims(gl.convert_layout(alpha, of_sum), 1)
        _barrier()
        adding = warpgroup_mma(weights, of_latents.index(stage), acc, is_async=True)
        # The scores of the next tile follow at once. Behind the last one, what they are doesn't matter.
        following = visit + 1
        other = following % _STAGES
        mbarrier.wait(arrived.index(other), (following // _STAGES) & 1, pred=following < n_tiles)
        product = multiply(q_latents, q_rotary, buffers, other, zero)
        acc = warpgroup_mma_wait(1, deps=(adding,))
        # Both warpgroups have read the stage.
        _barrier()
        if visit + _STAGES < n_tiles:
            ask_for_tile(tile + _STAGES, stage, table, boxes, buffers, arrived, C)
        score = warpgroup_mma_wait(0, deps=(product,))
    total = gl.sum(totals, axis=1)

    entry = (sequence.to(gl.int64) * max_q + index) * n_heads + head
    part = split.to(gl.int64) * n_entries + entry
    gl.store(split_sums + part * 4, running, mask=is_row)
    gl.store(split_sums + part * 4 + 1, total, mask=is_row)
    part_of_sum = gl.convert_layout(part, of_sum)
    row_of_sum = gl.convert_layout(is_row, of_sum)
    channel = gl.arange(0, C.HEAD_DIM, layout=gl.SliceLayout(0, sums))
    gl.store(
        split_out + gl.expand_dims(part_of_sum, 1) * C.HEAD_DIM + gl.expand_dims(channel, 0),
        acc,
        mask=gl.expand_dims(row_of_sum, 1),
    )

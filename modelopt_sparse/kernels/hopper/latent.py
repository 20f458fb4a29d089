"""The kernel for dense decode over latents: 64 rows attend to keys that hold their values. Hopper only.

Two warpgroups take turns: each computes all scores of every other tile, and keeps half of the channels of the
output, so that one multiplies while the other takes exponentials. In plain Triton both compute all scores.
Source: DeepSeek-V2 (arXiv 2405.04434); the turns are FlashMLA's.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from modelopt_sparse.kernels.device.run_time import RUN_TIME

from .common import finite, load_box, shrink, wait_for_all

ROWS = 64
KEYS = 64
WARPS = 4  # of each warpgroup
REGISTERS = 248  # of a thread
_ROWS = gl.constexpr(ROWS)
_KEYS = gl.constexpr(KEYS)
_WARPS = gl.constexpr(WARPS)
_REGISTERS = gl.constexpr(REGISTERS)
# Those that `multiply` leaves in flight.
_PRODUCTS = gl.constexpr(3)


@gluon.jit
def ask_for_half(row, visit, boxes, buffers, barriers, HALF: gl.constexpr):
    """Starts the copy of half of the latent channels of the tile that begins with a row of the box."""
    latents = boxes[0]
    place = visit % 2 * 2 + HALF
    barrier = barriers[0].index(place)
    mbarrier.expect(barrier, latents.block_type.nbytes)
    load_box(latents, [row, HALF * latents.block_type.shape[1]], barrier, buffers[2].index(place))


@gluon.jit
def ask_for_rotary(row, visit, boxes, buffers, barriers):
    """Starts the copy of the rotary channels of a tile."""
    rotary = boxes[1]
    barrier = barriers[1].index(visit % 2)
    mbarrier.expect(barrier, rotary.block_type.nbytes)
    load_box(rotary, [row, 0], barrier, buffers[3].index(visit % 2))


@gluon.jit
def row_of(visit, split, C: gl.constexpr):
    """Where a tile lies in the boxes: its first row."""
    first_tile, n_tiles, n_k, table, page_rows = split
    TILES: gl.constexpr = C.PAGE // _KEYS
    tile = first_tile + visit
    return gl.load(table + tile // TILES) * page_rows + tile % TILES * _KEYS


@gluon.jit
def place_rows(rows, layout: gl.constexpr):
    """The head and the index in its sequence of each row, and which exist. Rows of one head lie together."""
    block, max_q, n_heads, n_q = rows
    place = block * _ROWS + gl.arange(0, _ROWS, layout=layout)
    index = place % max_q
    return place // max_q, index, (place < n_heads * max_q) & (index < n_q)


@gluon.jit
def load_queries(q, first_row, rows, strides, first, CHANNELS: gl.constexpr):
    """Some channels of the rows: [rows, CHANNELS]."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [_WARPS, 1], [1, 0])
    of_row: gl.constexpr = gl.SliceLayout(1, layout)
    head, index, is_row = place_rows(rows, of_row)
    channel = first + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, layout))
    token = (first_row + index).to(gl.int64)
    pointers = q + token * strides[0] + head.to(gl.int64) * strides[1]
    return gl.load(
        gl.expand_dims(pointers, 1) + gl.expand_dims(channel, 0),
        mask=gl.expand_dims(is_row, 1),
        other=0.0,
    )


@gluon.jit
def multiply(visit, zero, buffers, barriers, HALF: gl.constexpr):
    """Starts the products of all rows and the keys of a tile, as its channels come: _PRODUCTS of them."""
    queries, q_rotary, keys, k_rotary = buffers[0], buffers[1], buffers[2], buffers[3]
    stage, phase = visit % 2, visit // 2 & 1
    own, other = stage * 2 + HALF, stage * 2 + 1 - HALF
    mbarrier.wait(barriers[0].index(own), phase)
    product = warpgroup_mma(
        queries.index(HALF), keys.index(own).permute((1, 0)), zero, use_acc=False, is_async=True
    )
    mbarrier.wait(barriers[0].index(other), phase)
    product = warpgroup_mma(
        queries.index(1 - HALF), keys.index(other).permute((1, 0)), product, is_async=True
    )
    mbarrier.wait(barriers[1].index(stage), phase)
    return warpgroup_mma(q_rotary, k_rotary.index(stage).permute((1, 0)), product, is_async=True)


@gluon.jit
def weigh(
    score, visit, running, total, buffers, barriers, split, rows, scale_log2, C: gl.constexpr
):
    """The softmax step of a tile. Hands its weights and the running max to the other warpgroup.

    Returns:
        the weights [rows, keys], the running max, the sum of weights, and the factor by which sums shrink.
    """
    first_tile, n_tiles, n_k, table, page_rows = split
    stage, n_q = visit % 2, rows[3]
    first = (first_tile + visit) * _KEYS
    least_high = n_k
    if C.CAUSAL:
        least_high = n_k - n_q + 1
    if first + _KEYS > least_high:
        of_score: gl.constexpr = running.type.layout
        head, index, is_row = place_rows(rows, of_score)
        high = gl.where(is_row, n_k, 0)
        if C.CAUSAL:
            high = gl.where(is_row, n_k - n_q + index + 1, 0)
        key = first + gl.arange(0, _KEYS, layout=gl.SliceLayout(0, score.type.layout))
        score = gl.where(gl.expand_dims(key, 0) < gl.expand_dims(high, 1), score, float("-inf"))
    new = gl.maximum(running, gl.max(score, axis=1) * scale_log2)
    pivot = finite(new)
    p = gl.exp2(score * scale_log2 - gl.expand_dims(pivot, 1))
    weights = p.to(buffers[3].dtype)
    # In the place of the rotary channels, which nobody needs any more.
    buffers[3].index(stage).store(weights)
    buffers[4].index(stage).store(new)
    fence_async_shared()
    wait_for_all()
    mbarrier.arrive(barriers[2].index(stage), count=1)
    alpha = gl.exp2(running - pivot)
    return weights, new, total * alpha + gl.sum(p, axis=1), alpha


@gluon.jit
def take_over(visit, running, total, acc, buffers, barriers):
    """Waits for the other warpgroup's weights of a tile, and brings the sums to its running max."""
    mbarrier.wait(barriers[2].index(visit % 2), visit // 2 & 1)
    of_score: gl.constexpr = running.type.layout
    new = buffers[4].index(visit % 2).load(of_score)
    alpha = gl.exp2(running - finite(new))
    return new, total * alpha, shrink(acc, alpha)


@gluon.jit
def add_values(visit, acc, buffers, HALF: gl.constexpr):
    """Starts the product of the other warpgroup's weights of a tile and half of its values."""
    stage = visit % 2
    return warpgroup_mma(
        buffers[3].index(stage), buffers[2].index(stage * 2 + HALF), acc, is_async=True
    )


@gluon.jit
def hide(visit, buffers, split, HALF: gl.constexpr):
    """Clears half of the values of a tile where there is no key: an unused slot may hold NaN."""
    WIDTH: gl.constexpr = 64
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [_WARPS, 1], [1, 0])
    first_tile, n_tiles, n_k, table, page_rows = split
    left = n_k - (first_tile + visit) * _KEYS
    if left < _KEYS:
        half = buffers[2].index(visit % 2 * 2 + HALF)
        exists = gl.arange(0, _KEYS, layout=gl.SliceLayout(1, layout)) < left
        for i in gl.static_range(half.shape[1] // WIDTH):
            part = half.slice(i * WIDTH, WIDTH, dim=1)
            values = part.load(layout)
            part.store(gl.where(gl.expand_dims(exists, 1), values, 0.0).to(values.dtype))
        fence_async_shared()
        wait_for_all()


@gluon.jit
def refill(visit, boxes, buffers, barriers, split, HALF: gl.constexpr, C: gl.constexpr):
    """Asks for the tile after next of the other warpgroup, in the place of what this one has just added."""
    if visit < split[1]:
        row = row_of(visit, split, C)
        ask_for_half(row, visit, boxes, buffers, barriers, HALF)
        ask_for_rotary(row, visit, boxes, buffers, barriers)


@gluon.jit
def attend_tile(
    visit, running, total, acc, boxes, buffers, barriers, split, rows, scale_log2,
    HALF: gl.constexpr, FOLLOWS: gl.constexpr, C: gl.constexpr,
):  # fmt: skip
    """A tile of this warpgroup's, and (FOLLOWS) the values of the one before it, which is the other's."""
    scores: gl.constexpr = running.type.layout.parent
    of_weights: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, k_width=2)
    zero = gl.full([_ROWS, _KEYS], 0.0, gl.float32, scores)
    # The first adds the values before it computes scores, the second after: then neither waits for long.
    if not FOLLOWS:
        product = multiply(visit, zero, buffers, barriers, HALF)
        score = warpgroup_mma_wait(0, deps=(product,))
    elif HALF == 0:
        running, total, acc = take_over(visit - 1, running, total, acc, buffers, barriers)
        adding = add_values(visit - 1, acc, buffers, HALF)
        product = multiply(visit, zero, buffers, barriers, HALF)
        acc = warpgroup_mma_wait(_PRODUCTS, deps=(adding,))
        refill(visit + 1, boxes, buffers, barriers, split, HALF, C)
        score = warpgroup_mma_wait(0, deps=(product,))
    else:
        product = multiply(visit, zero, buffers, barriers, HALF)
        running, total, acc = take_over(visit - 1, running, total, acc, buffers, barriers)
        adding = add_values(visit - 1, acc, buffers, HALF)
        score = warpgroup_mma_wait(1, deps=(product,))
    weights, running, total, alpha = weigh(
        score, visit, running, total, buffers, barriers, split, rows, scale_log2, C
    )
    if HALF == 1:
        acc = warpgroup_mma_wait(0, deps=(adding,))
        refill(visit + 1, boxes, buffers, barriers, split, HALF, C)
    hide(visit, buffers, split, HALF)
    acc = shrink(acc, alpha)
    own = warpgroup_mma(
        gl.convert_layout(weights, of_weights),
        buffers[2].index(visit % 2 * 2 + HALF),
        acc,
        is_async=True,
    )
    acc = warpgroup_mma_wait(0, deps=(own,))
    if visit + 2 < split[1]:
        ask_for_half(row_of(visit + 2, split, C), visit + 2, boxes, buffers, barriers, HALF)
    return running, total, acc


@gluon.jit
def attend_half(
    boxes, buffers, barriers, split, rows, scale_log2, outputs, HALF: gl.constexpr, C: gl.constexpr
):
    """One warpgroup: the scores of every other tile, and half of the channels of the output.

    Args:
        boxes: descriptors of half of the latent channels, and of the rotary channels, of all pages.
        buffers: shared memory of the queries [2, rows, HEAD_DIM / 2] and their rotary channels, of two tiles
            of keys [4, keys, HEAD_DIM / 2] and their rotary channels (then the weights), of two running
            maxima [2, rows], and of the second's sums [rows].
        barriers: halves, rotary channels, and weights of a tile are there, and the second's sums.
        split: first tile, number of tiles, keys of the sequence, block table, rows from page to page.
        rows: see `place_rows`. outputs: see `store`.
    """
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, C.HEAD_DIM // 2, 16])
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_WARPS, 1], [16, _KEYS, 16])
    running = gl.full([_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, scores))
    total = gl.full([_ROWS], 0.0, gl.float32, gl.SliceLayout(1, scores))
    acc = gl.full([_ROWS, C.HEAD_DIM // 2], 0.0, gl.float32, sums)
    if HALF == 0:
        running, total, acc = attend_tile(
            0, running, total, acc, boxes, buffers, barriers, split, rows, scale_log2, HALF, False, C
        )  # fmt: skip
    for visit in range(2 - HALF, split[1], 2):
        running, total, acc = attend_tile(
            visit, running, total, acc, boxes, buffers, barriers, split, rows, scale_log2, HALF, True, C
        )  # fmt: skip
    last = split[1] - 1
    if last % 2 != HALF:
        running, total, acc = take_over(last, running, total, acc, buffers, barriers)
        hide(last, buffers, split, HALF)
        acc = warpgroup_mma_wait(0, deps=(add_values(last, acc, buffers, HALF),))
    store(running, total, acc, buffers, barriers, rows, outputs, HALF)


@gluon.jit
def store(running, total, acc, buffers, barriers, rows, outputs, HALF: gl.constexpr):
    """Stores half of the channels of a split. The first warpgroup stores the sums, the second's included.

    Args:
        outputs: `split_sums`, `split_out`, and the entry there of the first row of the first head.
    """
    split_sums, split_out, first_entry = outputs
    n_heads = rows[2]
    totals, there = buffers[5], barriers[3]
    of_total: gl.constexpr = total.type.layout
    if HALF == 0:
        mbarrier.wait(there, 0)
        total += totals.load(of_total)
        head, index, is_row = place_rows(rows, of_total)
        entry = first_entry + index * n_heads + head
        gl.store(split_sums + entry * 4, running, mask=is_row)
        gl.store(split_sums + entry * 4 + 1, total, mask=is_row)
    else:
        totals.store(total)
        wait_for_all()
        mbarrier.arrive(there, count=1)
    layout: gl.constexpr = acc.type.layout
    of_row: gl.constexpr = gl.SliceLayout(1, layout)
    CHANNELS: gl.constexpr = acc.type.shape[1]
    head, index, is_row = place_rows(rows, of_row)
    entry = first_entry + index * n_heads + head
    channel = HALF * CHANNELS + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, layout))
    gl.store(
        split_out + gl.expand_dims(entry, 1) * (2 * CHANNELS) + gl.expand_dims(channel, 0),
        acc,
        mask=gl.expand_dims(is_row, 1),
    )


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
        latents, rotary: descriptors of half of the latent channels, and of the rotary ones, of all pages:
            [rows, HEAD_DIM / 2] and [rows, REST].
        scale_log2: the softmax scale times log2(e).
        The others are those of `decode_kernel`.
    """
    pid = gl.program_id(0)
    block = pid % n_blocks
    pid = pid // n_blocks
    number = pid % n_splits
    sequence = pid // n_splits
    n_q = gl.load(q_len + sequence)
    n_k = gl.load(k_len + sequence)
    if C.ALL_DECODE:
        if n_q == 0:
            return
    elif n_q != 1:
        return
    split_tiles = gl.where(n_k < long_keys, short_tiles, long_tiles)
    first_tile = number * split_tiles
    # Of no keys there are no splits.
    if first_tile * _KEYS >= n_k:
        return
    n_tiles = gl.minimum(split_tiles, (n_k + _KEYS - 1) // _KEYS - first_tile)

    HALF: gl.constexpr = C.HEAD_DIM // 2
    dtype: gl.constexpr = q.dtype.element_ty
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    narrow: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    buffers = (
        gl.allocate_shared_memory(dtype, [2, _ROWS, HALF], wide),
        gl.allocate_shared_memory(dtype, [_ROWS, C.REST], wide),
        gl.allocate_shared_memory(dtype, [4, _KEYS, HALF], wide),
        gl.allocate_shared_memory(dtype, [2, _KEYS, C.REST], wide),
        gl.allocate_shared_memory(gl.float32, [2, _ROWS], narrow),
        gl.allocate_shared_memory(gl.float32, [_ROWS], narrow),
    )
    barriers = (
        gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
    )
    for half in gl.static_range(4):
        mbarrier.init(barriers[0].index(half), count=1)
    for stage in gl.static_range(2):
        mbarrier.init(barriers[1].index(stage), count=1)
        mbarrier.init(barriers[2].index(stage), count=1)
    mbarrier.init(barriers[3], count=1)
    fence_async_shared()
    wait_for_all()

    boxes = (latents, rotary)
    table = k_table + sequence.to(gl.int64) * k_table_stride
    split = (first_tile, n_tiles, n_k, table, box_page_rows)
    for visit in gl.static_range(2):
        if visit < n_tiles:
            first_key = row_of(visit, split, C)
            ask_for_half(first_key, visit, boxes, buffers, barriers, 0)
            ask_for_half(first_key, visit, boxes, buffers, barriers, 1)
            ask_for_rotary(first_key, visit, boxes, buffers, barriers)

    rows = (block, max_q, n_heads, n_q)
    first_row, strides = gl.load(q_start + sequence), (q_token, q_head)
    # All loads are under way before the first is waited for.
    left = load_queries(q, first_row, rows, strides, 0, HALF)
    right = load_queries(q, first_row, rows, strides, HALF, HALF)
    rest = load_queries(q, first_row, rows, strides, C.HEAD_DIM, C.REST)
    buffers[0].index(0).store(left)
    buffers[0].index(1).store(right)
    buffers[1].store(rest)
    fence_async_shared()
    wait_for_all()

    first_entry = number.to(gl.int64) * n_entries + sequence.to(gl.int64) * max_q * n_heads
    outputs = (split_sums, split_out, first_entry)
    gl.warp_specialize(
        [
            (attend_half, (boxes, buffers, barriers, split, rows, scale_log2, outputs, gl.constexpr(0), C)),
            (attend_half, (boxes, buffers, barriers, split, rows, scale_log2, outputs, gl.constexpr(1), C)),
        ],
        [_WARPS],
        [_REGISTERS],
    )  # fmt: skip

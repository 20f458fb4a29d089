"""The loops of the backward pass: probabilities once more, and the gradients of scores."""

from __future__ import annotations

import triton
import triton.language as tl

from modelopt_sparse.kernels.device.scores import (
    columns_to_keys,
    load_keys,
    load_rows,
    tanh,
    transform,
    visible,
)
from modelopt_sparse.kernels.device.sequence import row_limits
from modelopt_sparse.kernels.device.softmax import LOG2_E
from modelopt_sparse.kernels.stages.nm import nm_select, nm_shielded


@triton.jit
def score_gradients(
    product, excess, keys, n_k, rows, lse, delta, words, grids, numbers,
    C: tl.constexpr, IS_EDGE: tl.constexpr,
):  # fmt: skip
    """Of a tile of scores: the weights of the values, and the gradient after and before the softcap.

    Args:
        product: [BLOCK_M, BLOCK_N], q times k. excess: of the same shape, the output's gradient times v, less
            delta.
        keys: [BLOCK_N] positions.
        rows: (position, low, high, is_row, sees), [BLOCK_M] each, as for `visible`.
        lse: [BLOCK_M] log2, inf in rows whose weights are all 0. delta: [BLOCK_M], see `prepare_kernel`.
        words: [BLOCK_M], pointers to the decisions of each row's tile; for C.BITS.
        grids: (mask, bias). numbers: (factor, scale_log2, softcap, nm).
        IS_EDGE: some row may not see some key, or may have to keep it.
    """
    position, low, high, is_row, sees = rows
    mask, bias = grids
    factor, scale_log2, softcap, nm = numbers
    scores = transform(product, keys, n_k, is_row, bias, scale_log2, softcap, C)
    if IS_EDGE:
        if C.HAS_GRIDS:
            seen = visible(keys, low, high, sees, mask, bias, C)
        else:
            # Rows that don't take part see nothing, or have an lse of inf.
            seen = keys[None, :] < high[:, None]
            if C.HAS_LOWER_EDGE:
                seen = seen & (keys[None, :] >= low[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    if C.N > 0:
        chosen = nm_select(scores, C.N, C.M)
        if IS_EDGE:
            chosen = tl.where(nm_shielded(position, keys, nm[0], nm[1]), scores, chosen)
        scores = chosen
    if C.BITS:
        is_kept = kept_keys(words, keys, n_k, sees, C)
        if not C.EXACT:
            scores = tl.where(is_kept, scores, float("-inf"))
    p = tl.exp2(scores * factor - lse[:, None])
    weights = p
    if C.EXACT:
        # Skipped tiles add to the normaliser and nothing to the output.
        weights = tl.where(is_kept, p, 0.0)
        excess = tl.where(is_kept, excess, -delta[:, None])
    d_scores = p * excess
    if IS_EDGE or C.BITS:
        # What hidden keys hold may be NaN.
        d_scores = tl.where(scores == float("-inf"), 0.0, d_scores)
    d_product = d_scores
    if C.HAS_SOFTCAP:
        capped = tanh(product * (scale_log2 / (softcap * LOG2_E)))
        d_product = d_scores * (1 - capped * capped)
        if IS_EDGE or C.BITS:
            d_product = tl.where(scores == float("-inf"), 0.0, d_product)
    return weights, d_product, d_scores


@triton.jit
def kept_keys(words, keys, n_k, sees, C: tl.constexpr):
    """Whether the decision tile of a row and a key was computed: bool [BLOCK_M, BLOCK_N]."""
    tile = keys // C.TILE_KEYS
    exists = sees[:, None] & (keys < n_k)[None, :]
    word = tl.load(words[:, None] + (tile >> 5)[None, :], mask=exists, other=0)
    return ((word >> (tile & 31)[None, :]) & 1) != 0


@triton.jit
def query_gradients(
    d_q, start, stop, q, d_out, kv, rows, row_sums, visits, given, words, grids, bias_gradient, numbers,
    C: tl.constexpr, IS_EDGE: tl.constexpr,
):  # fmt: skip
    """Adds to the gradient of a program's query rows, before the scale: walks key tiles.

    Args:
        d_q: [BLOCK_M, BLOCK_D]. q: [BLOCK_M, BLOCK_D]; d_out: [BLOCK_M, BLOCK_DV].
        start, stop: the visits; of the full tiles, or else of the edges.
        kv: (k, v, k_stride, v_stride, k_box, v_box, n_k), pointers to the sequence's first key, and boxes as
            for `attend`.
        rows: (position, low, high, is_row, group, first_key, stop_key): [BLOCK_M] each, and the first and one
            past the last key that any row sees.
        row_sums: (lse, delta).
        visits: (top, n_before, n_full): the last tile, and how many edges come before how many full tiles.
        given: pointers to a list's tiles and to the row tiles that compute them.
        words, grids, numbers: as for `score_gradients`.
        bias_gradient: (pointers [BLOCK_M, 1], stride between keys).
        IS_EDGE: some row may not see some key, or may have to keep it.
    """
    AHEAD: tl.constexpr = C.AHEAD and not IS_EDGE
    position, low, high, is_row, group, first_key, stop_key = rows
    lse, delta = row_sums
    top, n_before, n_full = visits
    mask, bias = grids
    k, v, k_stride, v_stride, k_box, v_box, n_k = kv
    if AHEAD:
        # Without a visit there is no tile either, and no key is below this limit.
        limit = tl.where(start < stop, n_k, -(2**30))
        tile = visited_tile(tl.minimum(start, stop - 1), top, given, start < stop, C)
        v_tile = load_keys(v, v_stride, tile, keys_of(tile, C) < limit, C, C.HEAD_DIM_V, C.BLOCK_DV)
        d_p = tl.dot(d_out, tl.trans(v_tile), input_precision=C.PRECISION)
    for at in tl.range(start, stop, num_stages=C.STAGES):
        visit = at
        if IS_EDGE:
            visit = tl.where(at < n_before, at, at + n_full)
        tile = visited_tile(visit, top, given, True, C)
        keys = keys_of(tile, C)
        takes_rows = is_row
        tile_lse = lse
        if C.GIVEN and C.GROUPS > 1:
            groups = tl.load(given[1] + visit // (C.TILE_KEYS // C.BLOCK_N)).to(tl.int32)
            takes_rows = is_row & (((groups >> group) & 1) != 0)
            tile_lse = tl.where(takes_rows, lse, float("inf"))
        if IS_EDGE:
            # What no row sees must not be read.
            is_key = (keys >= first_key) & (keys < stop_key)
            if C.HAS_GRIDS or C.HAS_BOUNDS:
                seen = visible(keys, low, high, takes_rows, mask, bias, C)
                is_key = is_key & (tl.max(seen.to(tl.int32), 0) != 0)
            k_tile = load_keys(k, k_stride, tile, is_key, C, C.HEAD_DIM, C.BLOCK_D)
            v_tile = load_keys(v, v_stride, tile, is_key, C, C.HEAD_DIM_V, C.BLOCK_DV)
        else:
            # Ahead: the product with the values of the next visit runs while exponentials are taken.
            v_number = tile
            if AHEAD:
                v_number = visited_tile(tl.minimum(visit + 1, stop - 1), top, given, True, C)
            if C.BOXES:
                k_tile = k_box[0].load([k_box[1] + tile * C.BLOCK_N, k_box[2]])
                v_tile = v_box[0].load([v_box[1] + v_number * C.BLOCK_N, v_box[2]])
            else:
                k_tile = load_keys(k, k_stride, tile, None, C, C.HEAD_DIM, C.BLOCK_D)
                v_tile = load_keys(v, v_stride, v_number, None, C, C.HEAD_DIM_V, C.BLOCK_DV)
        product = tl.dot(q, tl.trans(k_tile), input_precision=C.PRECISION)
        if AHEAD:
            # Before the next product is under way, so that it may use the same registers.
            excess = d_p - delta[:, None]
            d_p = tl.dot(d_out, tl.trans(v_tile), input_precision=C.PRECISION)
        else:
            excess = tl.dot(d_out, tl.trans(v_tile), input_precision=C.PRECISION) - delta[:, None]
        tile_rows = (position, low, high, is_row, takes_rows)
        _, d_product, d_scores = score_gradients(
            product,
            excess,
            keys,
            n_k,
            tile_rows,
            tile_lse,
            delta,
            words,
            grids,
            numbers,
            C,
            IS_EDGE,
        )
        if C.BIAS_GRADIENT:
            pointers, stride = bias_gradient
            seen = visible(keys, low, high, takes_rows, mask, bias, C)
            tl.store(pointers + keys.to(tl.int64)[None, :] * stride, d_scores, mask=seen)
        d_q = tl.dot(d_product.to(k_tile.dtype), k_tile, d_q, input_precision=C.PRECISION)
    return d_q


@triton.jit
def visited_tile(visit, top, given, exists, C: tl.constexpr):
    """The key tile of a visit. A listed decision tile may be several key tiles."""
    if C.GIVEN:
        PARTS: tl.constexpr = C.TILE_KEYS // C.BLOCK_N
        listed = tl.load(given[0] + visit // PARTS, mask=exists, other=0).to(tl.int32)
        return listed * PARTS + visit % PARTS
    return top - visit


@triton.jit
def keys_of(tile, C: tl.constexpr):
    """Positions of a key tile's columns: [BLOCK_N]."""
    return tile * C.BLOCK_N + columns_to_keys(C)


@triton.jit
def key_gradients(
    state, start, stop, k, v, keys, n_k, heads, queries, place, row_sums, visits, given, words, limits, grids,
    numbers, C: tl.constexpr, IS_EDGE: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of a program's keys and values: walks row blocks of all its query heads.

    One loop over all heads, for each loop starts with waiting for its first loads.

    Args:
        state: (d_k [BLOCK_N, BLOCK_D], d_v [BLOCK_N, BLOCK_DV]).
        start, stop: the visits; of row blocks that see all keys, or else of the edges. Without C.GIVEN, all
            C.MEMBERS heads visit a row block in turn.
        k, v: the tiles. keys: [BLOCK_N] positions.
        heads: (first head, rows of the packed tensors).
        queries: (q, d_out, q_strides, d_out_strides, q_box, d_out_box), pointers to row 0 of head 0; where
            C.BOXES, boxes are (descriptor [.., D], rows and columns from a head to the next).
        place: (base, first, n_q, first_row): the position at which row blocks begin, that of the sequence's
            first row, how many rows it has, and where they begin in the packed tensors.
        row_sums: pointer, see `prepare_kernel`.
        visits: (first_block, n_before, n_full): the first row block, and how many edges come before how many
            full ones.
        given: pointers to a list's row blocks, from the front or the end, and to their tags.
        words: (pointer, step, step of heads): decisions of head 0's row tile at `base`, and from one row tile
            or head to the next.
        limits: (bounds, window).
        grids: as (pointer [1, 1] to row 0 and key 0 of head 0, strides of heads, rows and keys).
    """
    d_k, d_v = state
    first_head, n_rows = heads
    q, d_out, q_strides, d_out_strides, q_box, d_out_box = queries
    q_stride, q_head = q_strides
    d_out_stride, d_out_head = d_out_strides
    base, first, n_q, first_row = place
    first_block, n_before, n_full = visits
    given_blocks, given_tags = given
    bounds, window = limits
    mask, bias = grids
    within = tl.arange(0, C.BLOCK_M)
    # A branch, for the reason that is given in `attend`.
    if start < stop:
        for at in tl.range(start, stop, num_stages=C.STAGES):
            visit = at if C.GIVEN else at // C.MEMBERS
            tag = 0
            if C.GIVEN:
                tag = tl.load(given_tags + (-visit if IS_EDGE else visit)).to(tl.int32)
                head = first_head + (tag >> 8)
            else:
                head = first_head + at % C.MEMBERS
            if C.LISTED:
                block = tl.load(given_blocks + (-visit if IS_EDGE else visit)).to(tl.int32)
            else:
                if IS_EDGE:
                    visit = tl.where(visit < n_before, visit, visit + n_full)
                else:
                    visit += n_before
                block = first_block + visit
            position = base + block * C.BLOCK_M + within
            block_row = (first_row + base - first + block * C.BLOCK_M).to(tl.int64)
            q_block = q + head.to(tl.int64) * q_head + block_row * q_stride
            d_out_block = d_out + head.to(tl.int64) * d_out_head + block_row * d_out_stride
            sums = row_sums + head.to(tl.int64) * n_rows * 2 + block_row
            is_row = (position >= first) & (position < first + n_q)
            takes_rows = is_row
            if C.GIVEN and C.GROUPS > 1:
                takes_rows = is_row & (((tag >> (within // (C.BLOCK_M // C.GROUPS))) & 1) != 0)
            if IS_EDGE:
                live = takes_rows
                if C.HAS_GRIDS or C.HAS_BOUNDS:
                    # What rows hold that see no key must not be read.
                    of_rows = tl.load(sums + within, mask=takes_rows, other=float("inf"))
                    live = takes_rows & (of_rows != float("inf"))
                q_tile = load_rows(q_block, q_stride, within, live, C.HEAD_DIM, C.BLOCK_D)
                d_out_tile = load_rows(
                    d_out_block, d_out_stride, within, live, C.HEAD_DIM_V, C.BLOCK_DV
                )
            elif C.BOXES:
                box_row = block_row.to(tl.int32)
                q_tile = q_box[0].load([box_row + head * q_box[1], head * q_box[2]])
                d_out_tile = d_out_box[0].load([box_row + head * d_out_box[1], head * d_out_box[2]])
            else:
                q_tile = load_rows(q_block, q_stride, within, None, C.HEAD_DIM, C.BLOCK_D)
                d_out_tile = load_rows(
                    d_out_block, d_out_stride, within, None, C.HEAD_DIM_V, C.BLOCK_DV
                )
            if C.UPCAST:
                q_tile = q_tile.to(tl.float32)
                d_out_tile = d_out_tile.to(tl.float32)
            if C.N > 0:
                # As in the forward kernel, so that the same scores are chosen.
                product = tl.dot(q_tile, tl.trans(k), input_precision=C.PRECISION)
                d_p = tl.dot(d_out_tile, tl.trans(v), input_precision=C.PRECISION)
            else:
                # Keys by rows, so that weights go from product to product in registers.
                product = tl.trans(tl.dot(k, tl.trans(q_tile), input_precision=C.PRECISION))
                d_p = tl.trans(tl.dot(v, tl.trans(d_out_tile), input_precision=C.PRECISION))
            # Loaded late, for every thread has many of them.
            lse, delta = load_sums(sums, n_rows, takes_rows, C, IS_EDGE)
            if IS_EDGE or (C.GIVEN and C.GROUPS > 1):
                lse = tl.where(takes_rows, lse, float("inf"))
            row = block_row + within
            low, high = row_limits(
                position, row, is_row, n_k, bounds, window, C.CAUSAL, C.HAS_BOUNDS
            )
            tile_grids = grids
            if C.HAS_MASK:
                pointers = grid_rows(mask, head, position - first)
                tile_grids = ((pointers, mask[3]), tile_grids[1])
            if C.HAS_BIAS:
                pointers = grid_rows(bias, head, position - first)
                tile_grids = (tile_grids[0], (pointers, bias[3]))
            row_words = within
            if C.BITS:
                row_tile = (position - base) // C.TILE_ROWS if C.TILE_ROWS > 0 else within * 0
                row_words = (
                    words[0] + row_tile.to(tl.int64) * words[1] + head.to(tl.int64) * words[2]
                )
            tile_rows = (position, low, high, is_row, takes_rows)
            weights, d_product, _ = score_gradients(
                product, d_p - delta[:, None], keys, n_k, tile_rows, lse, delta, row_words, tile_grids,
                numbers, C, IS_EDGE,
            )  # fmt: skip
            d_v = tl.dot(
                tl.trans(weights.to(d_out_tile.dtype)), d_out_tile, d_v, input_precision=C.PRECISION
            )
            d_k = tl.dot(
                tl.trans(d_product.to(q_tile.dtype)), q_tile, d_k, input_precision=C.PRECISION
            )
    return d_k, d_v


@triton.jit
def grid_rows(grid, head, row):
    """Pointers to rows of one head of a grid: [BLOCK_M, 1].

    Args:
        grid: (pointer to row 0 of head 0, strides of heads and of rows, ..).
    """
    return grid[0] + head.to(tl.int64) * grid[1] + row.to(tl.int64)[:, None] * grid[2]


@triton.jit
def load_sums(sums, step, is_row, C: tl.constexpr, IS_EDGE: tl.constexpr):
    """lse and delta of a row block: [BLOCK_M] each, anything where not `is_row`.

    Args:
        sums: pointer to the lse of the block's first row; delta lies `step` elements on.
    """
    # In four lines, two of which don't exist: with as many elements as threads, each is loaded once; fewer
    # would be loaded by every thread that needs them.
    line = tl.arange(0, 4)
    exists = (line < 2)[:, None]
    if IS_EDGE:
        exists = exists & is_row[None, :]
    pointers = sums + line[:, None] * step + tl.arange(0, C.BLOCK_M)[None, :]
    lines = tl.load(pointers, mask=exists, other=0.0)
    even, odd = tl.split(tl.permute(tl.reshape(lines, [2, 2, C.BLOCK_M]), [2, 0, 1]))
    lse, _ = tl.split(even)
    delta, _ = tl.split(odd)
    return lse, delta

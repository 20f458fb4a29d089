"""A tile of scores: loads, products, softcap, bias, and what is hidden."""

from __future__ import annotations

import triton
import triton.language as tl

from .softmax import LOG2_E


@triton.jit
def load_rows(base, stride, rows, is_row, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a packed tensor [tokens, DIM]: [rows, BLOCK], 0 where not `is_row` and beyond DIM.

    Args:
        base: pointer to the head's first channel of token 0. stride: elements from token to token.
        rows: int tensor of token numbers. is_row: bool of its shape, or None for all.
    """
    channel = tl.arange(0, BLOCK)
    pointers = base + rows.to(tl.int64)[:, None] * stride + channel[None, :]
    if DIM < BLOCK:
        inside = (channel < DIM)[None, :]
        if is_row is not None:
            inside = inside & is_row[:, None]
        return tl.load(pointers, mask=inside, other=0.0)
    if is_row is not None:
        return tl.load(pointers, mask=is_row[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def columns_to_keys(C: tl.constexpr):
    """Which key of a tile each column holds: [BLOCK_N].

    With N:M, keys of one place in their groups lie together, see `stages.nm`.
    """
    column = tl.arange(0, C.BLOCK_N)
    if C.N > 0:
        GROUPS: tl.constexpr = C.BLOCK_N // C.M
        return column % GROUPS * C.M + column // GROUPS
    return column


@triton.jit
def load_keys(base, stride, tile, is_key, C: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The keys (or values) of a tile, packed, in the order of its columns and the dtype of the queries.

    Args:
        base: pointer to the head's first channel of the sequence's first key. stride: from key to key.
        is_key: bool [BLOCK_N], where others are 0; or None for all.
    Returns:
        [BLOCK_N, BLOCK].
    """
    tile_base = base + (tile * C.BLOCK_N).to(tl.int64) * stride
    return as_queries(load_rows(tile_base, stride, columns_to_keys(C), is_key, DIM, BLOCK), C)


@triton.jit
def as_queries(x, C: tl.constexpr):
    """Keys or values as they are stored, in the dtype of the queries."""
    return x if C.KV_AS is None else x.to(C.KV_AS)


@triton.jit
def pages_of(table, table_stride, page_stride, sequence, C: tl.constexpr):
    """A sequence's table, and elements from page to page; nothing to use where keys are packed."""
    if C.PAGE > 0:
        return table + sequence.to(tl.int64) * table_stride, page_stride
    else:
        return sequence, sequence


@triton.jit
def pages_at(kv, tile, stop_key, C: tl.constexpr):
    """The pages in which the keys of a tile lie, and its values: of each key, or of all where they share one.

    A loop asks for those of its next tile before it computes this one, for loads that wait for a table wait
    twice. Nothing to use where keys are packed.

    Args:
        kv: as for `load_k`. stop_key: one past the last key that a row sees; a table may end there.
    """
    return page_numbers(kv[6][0], tile, stop_key, C), page_numbers(kv[7][0], tile, stop_key, C)


@triton.jit
def page_numbers(table, tile, stop_key, C: tl.constexpr):
    """int32, one, C.PIECES, or [BLOCK_N]; see `pages_at`."""
    if C.PAGE == 0:
        return tile
    elif C.PIECES == 2:
        first = page_of_key(table, tile * C.BLOCK_N, stop_key, C)
        return first, page_of_key(table, tile * C.BLOCK_N + C.PAGE, stop_key, C)
    elif C.PAGE % C.BLOCK_N == 0:
        return page_of_key(table, tile * C.BLOCK_N, stop_key, C)
    else:
        return page_of_key(table, tile * C.BLOCK_N + columns_to_keys(C), stop_key, C)


@triton.jit
def page_of_key(table, key, stop_key, C: tl.constexpr):
    """The page of a key (or of each), 0 where there is none."""
    return tl.load(table + key // C.PAGE, mask=(key >= 0) & (key < stop_key), other=0)


@triton.jit
def load_stored(
    base, stride, page_stride, page, tile, shown,
    C: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`load_keys` of keys that may be in pages, in the dtype that they are stored in.

    Args:
        base: where they are, pointer to the head's first channel of slot 0 of page 0. stride: from slot to
            slot.
        page: from `page_numbers`.
    """
    if C.PAGE == 0:
        base += (tile * C.BLOCK_N).to(tl.int64) * stride
        return load_rows(base, stride, columns_to_keys(C), shown, DIM, BLOCK)
    elif C.PAGE % C.BLOCK_N == 0:
        base += page.to(tl.int64) * page_stride
        slot = tile % (C.PAGE // C.BLOCK_N) * C.BLOCK_N
        base += slot.to(tl.int64) * stride
        return load_rows(base, stride, columns_to_keys(C), shown, DIM, BLOCK)
    else:
        keys = tile * C.BLOCK_N + columns_to_keys(C)
        if C.PIECES == 2:
            page = tl.where(keys % C.BLOCK_N < C.PAGE, page[0], page[1])
        bases = base + (page.to(tl.int64) * page_stride)[:, None]
        slots = keys % C.PAGE
        return load_rows(bases, stride, slots, shown, DIM, BLOCK)


@triton.jit
def load_box(box, page, tile, C: tl.constexpr):
    """The keys (or values) of a tile, as they are stored: [BLOCK_N, channels of the box], or two halves.

    Args:
        box: (descriptor, row of the head's first key (or of slot 0 of its page 0), rows from page to page,
            column of the head).
        page: as for `load_stored`.
    """
    boxes, row, page_rows, column = box
    if C.PIECES == 2:
        return (
            boxes.load([row + page[0] * page_rows, column]),
            boxes.load([row + page[1] * page_rows, column]),
        )
    elif C.PAGE > 0:
        slot = tile % (C.PAGE // C.BLOCK_N) * C.BLOCK_N
        return boxes.load([row + page * page_rows + slot, column])
    else:
        return boxes.load([row + tile * C.BLOCK_N, column])


@triton.jit
def load_k(kv, tile, pages, shown, C: tl.constexpr, BY_BOX: tl.constexpr):
    """The keys of a tile, as they are stored: [BLOCK_N, BLOCK_D], or what `load_box` returns.

    Args:
        kv: (k, v, k_stride, v_stride, k_box, v_box, k_pages, v_pages, rest_box): pointers and strides as for
            `load_stored`; boxes as for `load_box`, for C.BOXES; pages are (table of the sequence, elements
            from page to page).
        pages: from `pages_at`.
        shown: bool [BLOCK_N], where others are 0; or None for all. By boxes all are loaded.
    """
    k, v, k_stride, v_stride, k_box, v_box, k_pages, v_pages, rest_box = kv
    if BY_BOX:
        return load_box(k_box, pages[0], tile, C)
    else:
        return load_stored(k, k_stride, k_pages[1], pages[0], tile, shown, C, C.HEAD_DIM, C.BLOCK_D)


@triton.jit
def load_v(kv, tile, pages, shown, C: tl.constexpr, BY_BOX: tl.constexpr):
    """The values of a tile, as `load_k` loads its keys: [BLOCK_N, BLOCK_DV]."""
    k, v, k_stride, v_stride, k_box, v_box, k_pages, v_pages, rest_box = kv
    if BY_BOX:
        return load_box(v_box, pages[1], tile, C)
    else:
        return load_stored(
            v, v_stride, v_pages[1], pages[1], tile, shown, C, C.HEAD_DIM_V, C.BLOCK_DV
        )


@triton.jit
def multiply_keys(q, k_tile, C: tl.constexpr, IN_PIECES: tl.constexpr):
    """Products of q and the keys of a tile: fp32 [BLOCK_M, BLOCK_N].

    Args:
        k_tile: from `load_k`. IN_PIECES: it came so.
    """
    if IN_PIECES:
        first_k = as_queries(k_tile[0], C)
        second_k = as_queries(k_tile[1], C)
        first = tl.dot(q, tl.trans(first_k), input_precision=C.PRECISION)
        second = tl.dot(q, tl.trans(second_k), input_precision=C.PRECISION)
        return tl.join(first, second).permute(0, 2, 1).reshape(C.BLOCK_M, C.BLOCK_N)
    else:
        return tl.dot(q, tl.trans(as_queries(k_tile, C)), input_precision=C.PRECISION)


@triton.jit
def add_values(acc, p, v_tile, C: tl.constexpr, IN_PIECES: tl.constexpr):
    """`acc` and the values of a tile, weighted: fp32 [BLOCK_M, BLOCK_DV].

    Args:
        p: weights [BLOCK_M, BLOCK_N]. v_tile: from `load_v`. IN_PIECES: it came so.
    """
    if IN_PIECES:
        first_v = as_queries(v_tile[0], C)
        second_v = as_queries(v_tile[1], C)
        halves = p.to(first_v.dtype).reshape(C.BLOCK_M, 2, C.BLOCK_N // 2).permute(0, 2, 1)
        first, second = halves.split()
        acc = tl.dot(first, first_v, acc, input_precision=C.PRECISION)
        return tl.dot(second, second_v, acc, input_precision=C.PRECISION)
    else:
        values = as_queries(v_tile, C)
        return tl.dot(p.to(values.dtype), values, acc, input_precision=C.PRECISION)


@triton.jit
def seen_keys(keys, is_key, low, high, sees, has_gaps, grids, C: tl.constexpr):
    """Which keys some row sees: bool [BLOCK_N]. The value of another may be NaN, and must reach nobody.

    Args:
        is_key: keys from the first that a row sees to the last.
        has_gaps: in between may lie some that none does.
    """
    mask, bias = grids
    if C.HAS_GRIDS:
        return is_key & any_row(visible(keys, low, high, sees, mask, bias, C))
    if C.HAS_BOUNDS:
        if has_gaps:
            is_key = is_key & any_row(visible(keys, low, high, sees, mask, bias, C))
    return is_key


@triton.jit
def any_row(x):
    """Which columns of a bool tensor hold a true value."""
    return tl.max(x.to(tl.int32), 0) != 0


@triton.jit
def grid_pointers(
    values, row_start, key_start, by_item, by_head, by_row, by_key, sequence, head, rows,
    EXISTS: tl.constexpr,
):  # fmt: skip
    """Pointers to the entries of a `ScoreGrid` for a program's rows and key 0: [BLOCK_M, 1].

    Args:
        by_item, by_head, by_row, by_key: strides.
        EXISTS: there is such a grid; else what is returned is nothing to use.
    """
    if EXISTS:
        first_row = tl.load(row_start + sequence).to(tl.int64)
        first_key = tl.load(key_start + sequence).to(tl.int64)
        base = values + sequence.to(tl.int64) * by_item + head.to(tl.int64) * by_head
        return base + (first_row + rows.to(tl.int64))[:, None] * by_row + first_key * by_key
    else:
        return rows


@triton.jit
def visible(keys, low, high, sees, mask, bias, C: tl.constexpr):
    """Which of `keys` each row sees: bool [BLOCK_M, keys].

    Args:
        low, high: [BLOCK_M], the keys [low, high) of each row. sees: rows that take part.
        mask, bias: (pointers [BLOCK_M, 1], stride between keys).
    """
    high = tl.where(sees, high, 0)
    seen = keys[None, :] < high[:, None]
    if C.HAS_LOWER_EDGE:
        seen = seen & (keys[None, :] >= low[:, None])
    if C.HAS_MASK:
        pointers, stride = mask
        seen = seen & (
            tl.load(pointers + keys.to(tl.int64)[None, :] * stride, mask=seen, other=0) != 0
        )
    if C.HAS_BIAS:
        pointers, stride = bias
        added = tl.load(pointers + keys.to(tl.int64)[None, :] * stride, mask=seen, other=0.0)
        seen = seen & (added.to(tl.float32) != float("-inf"))
    return seen


@triton.jit
def transform(product, keys, n_k, is_row, bias, scale_log2, softcap, C: tl.constexpr):
    """From products of q and k to log2 scores, where a softcap or a bias needs them; else unchanged.

    Args:
        scale_log2: the softmax scale times log2(e). softcap: in natural-log units.
    """
    if C.HAS_SOFTCAP:
        capped = softcap * LOG2_E
        x = tanh(product * (scale_log2 / capped)) * capped
    elif C.HAS_BIAS:
        x = product * scale_log2
    else:
        x = product
    if C.HAS_BIAS:
        pointers, stride = bias
        exists = is_row[:, None] & (keys < n_k)[None, :]
        added = tl.load(pointers + keys.to(tl.int64)[None, :] * stride, mask=exists, other=0.0)
        x += added.to(tl.float32) * LOG2_E
    return x


@triton.jit
def tanh(x):
    """Hyperbolic tangent, without overflow."""
    e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)

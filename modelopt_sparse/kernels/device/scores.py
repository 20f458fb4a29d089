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
    """The keys (or values) of a tile in the order of its columns, 0 where not `is_key`: [BLOCK_N, BLOCK].

    Args:
        base: pointer to the head's first channel of the sequence's first key. stride: from key to key.
        is_key: bool [BLOCK_N], or None for all.
    """
    tile_base = base + (tile * C.BLOCK_N).to(tl.int64) * stride
    x = load_rows(tile_base, stride, columns_to_keys(C), is_key, DIM, BLOCK)
    return x if C.KV_AS is None else x.to(C.KV_AS)


@triton.jit
def pages_of(table, table_stride, page_stride, sequence, C: tl.constexpr):
    """What `load_paged` takes of a sequence; nothing to use where keys are packed."""
    if C.PAGE > 0:
        return table + sequence.to(tl.int64) * table_stride, page_stride
    else:
        return sequence, sequence


@triton.jit
def load_paged(
    base, stride, pages, tile, is_key, C: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """`load_keys` of keys that may be in pages.

    Args:
        base: where they are, pointer to the head's first channel of slot 0 of page 0. stride: from slot to
            slot.
        pages: (pointer to the sequence's page numbers, elements from page to page).
    """
    if C.PAGE == 0:
        return load_keys(base, stride, tile, is_key, C, DIM, BLOCK)
    else:
        table, page_stride = pages
        if C.PAGE % C.BLOCK_N == 0:
            # A tile lies in one page.
            TILES: tl.constexpr = C.PAGE // C.BLOCK_N
            page = tl.load(table + tile // TILES).to(tl.int64)
            base += page * page_stride + (tile % TILES * C.BLOCK_N).to(tl.int64) * stride
            x = load_rows(base, stride, columns_to_keys(C), is_key, DIM, BLOCK)
        else:
            keys = tile * C.BLOCK_N + columns_to_keys(C)
            page = tl.load(table + keys // C.PAGE, mask=is_key).to(tl.int64)
            bases = base + (page * page_stride)[:, None]
            x = load_rows(bases, stride, keys % C.PAGE, is_key, DIM, BLOCK)
        return x if C.KV_AS is None else x.to(C.KV_AS)


@triton.jit
def load_k(kv, tile, is_key, C: tl.constexpr, IS_EDGE: tl.constexpr):
    """The keys of a tile: [BLOCK_N, BLOCK_D].

    Args:
        kv: (k, v, k_stride, v_stride, k_box, v_box, k_pages, v_pages): pointers, strides and pages as for
            `load_paged`; where C.BOXES, boxes are (descriptor [.., D], row of the sequence's first key,
            column of the head).
        is_key: bool [BLOCK_N], the columns to load at an edge; elsewhere all are. By boxes all are loaded at
            edges too: what a hidden key holds reaches hidden scores only.
    """
    k, v, k_stride, v_stride, k_box, v_box, k_pages, v_pages = kv
    if C.BOXES:
        return k_box[0].load([k_box[1] + tile * C.BLOCK_N, k_box[2]])
    shown = is_key if IS_EDGE else None
    return load_paged(k, k_stride, k_pages, tile, shown, C, C.HEAD_DIM, C.BLOCK_D)


@triton.jit
def load_v(
    kv, tile, keys, is_key, low, high, sees, has_gaps, grids,
    C: tl.constexpr, IS_EDGE: tl.constexpr,
):  # fmt: skip
    """The values of a tile: [BLOCK_N, BLOCK_DV]. At an edge as `only_seen` leaves them."""
    k, v, k_stride, v_stride, k_box, v_box, k_pages, v_pages = kv
    if IS_EDGE:
        values = load_paged(v, v_stride, v_pages, tile, is_key, C, C.HEAD_DIM_V, C.BLOCK_DV)
        return only_seen(values, keys, low, high, sees, has_gaps, grids, C)
    if C.BOXES:
        return v_box[0].load([v_box[1] + tile * C.BLOCK_N, v_box[2]])
    return load_paged(v, v_stride, v_pages, tile, None, C, C.HEAD_DIM_V, C.BLOCK_DV)


@triton.jit
def only_seen(values, keys, low, high, sees, has_gaps, grids, C: tl.constexpr):
    """Values of which those of keys that no row sees are 0, so that a NaN in an unused place reaches nobody.

    Args:
        values: [BLOCK_N, BLOCK_DV], 0 before the first key that a row sees, and after the last.
        has_gaps: in between may lie some that none does.
    """
    mask, bias = grids
    if C.HAS_GRIDS:
        seen = tl.max(visible(keys, low, high, sees, mask, bias, C).to(tl.int32), 0) != 0
        values = tl.where(seen[:, None], values, 0.0).to(values.dtype)
    elif C.HAS_BOUNDS:
        if has_gaps:
            seen = tl.max(visible(keys, low, high, sees, mask, bias, C).to(tl.int32), 0) != 0
            values = tl.where(seen[:, None], values, 0.0).to(values.dtype)
    return values


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

"""Keys and values as descriptors, which a GPU's copy engine reads in tiles."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .launch import block_dim


@lru_cache
def _has_copy_engine(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def boxes(
    tensors: Sequence[Tensor], block: int, is_wanted: bool = True
) -> tuple[list[Any], tuple[int, int], list[int]]:
    """Descriptors of tensors [tokens, heads, channels] or [pages, page_size, heads, channels].

    Args:
        tensors: of the same tokens and heads.
        block: tokens of a tile; of pages, a divisor of their size.
        is_wanted: all are None elsewhere, and where the GPU or the strides forbid.
    Returns:
        boxes: of rows that are tokens, in tiles [block, channels].
        rows: from head to head and from page to page, of all.
        columns: channels from head to head, of each.
    """
    none = [None] * len(tensors), (0, 0), [0] * len(tensors)
    if not is_wanted or not _has_copy_engine(tensors[0].device):
        return none
    layouts = [layout for x in tensors if (layout := layout_of(x)) is not None]
    rows = {layout[:2] for layout in layouts}
    fits = all(block_dim(x.shape[-1]) == x.shape[-1] for x in tensors)
    if not fits or len(layouts) < len(tensors) or len(rows) > 1:
        return none
    found = [_box(x, layout, block) for x, layout in zip(tensors, layouts, strict=True)]
    return found, rows.pop(), [layout[2] for layout in layouts]


def layout_of(x: Tensor) -> tuple[int, int, int] | None:
    """Rows from head to head, rows from page to page, and channels from head to head; None: no box does."""
    by_token, by_head, _ = x.stride()[-3:]
    by_page = x.stride(0) if x.dim() == 4 else 0
    size = x.element_size()
    fits = x.data_ptr() % 16 == 0 and by_token * size % 16 == 0 and by_head * size % 16 == 0
    if not fits or by_token <= 0 or not x.numel():
        return None
    if by_page % by_token:
        return None
    rows, columns = (by_head // by_token, 0) if by_head % by_token == 0 else (0, by_head)
    layout = rows, by_page // by_token, columns
    # Coordinates are 32 bits wide.
    return layout if max(shape_of(x, layout)) < 2**31 else None


def shape_of(x: Tensor, layout: tuple[int, int, int]) -> list[int]:
    """Rows and channels of the box that holds all of `x`."""
    rows, page_rows, columns = layout
    tokens, heads, dim = x.shape[-3:]
    pages = x.shape[0] if x.dim() == 4 else 1
    return [(pages - 1) * page_rows + (heads - 1) * rows + tokens, (heads - 1) * columns + dim]


def gluon_box(x: Tensor, layout: tuple[int, int, int], rows: int, channels: int) -> Any:
    """A descriptor of a tensor of a layout, for kernels in Gluon, in tiles of rows and channels."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    strides, shared = [x.stride(-3), 1], _swizzled(8 * x.element_size())
    return TensorDescriptor(x, shape_of(x, layout), strides, [rows, channels], shared)


@lru_cache
def _swizzled(bits: int) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(128, bits, 2)


def _box(x: Tensor, layout: tuple[int, int, int], block: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, shape_of(x, layout), [x.stride(-3), 1], [block, x.shape[-1]])

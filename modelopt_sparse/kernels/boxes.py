"""Packed tensors as descriptors, which a GPU's copy engine reads in tiles."""

from __future__ import annotations

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
    x: Tensor, y: Tensor, block: int, is_wanted: bool = True
) -> tuple[Any, Any, tuple[int, int, int]]:
    """Descriptors of two tensors [tokens, heads, D or Dv], and what a head adds to their coordinates.

    None where they aren't wanted, or where the GPU or the strides forbid.

    Returns:
        x_boxes, y_boxes: of rows of D channels, in tiles [block, D].
        steps: rows from head to head (of both), channels from head to head of x and of y.
    """
    none = None, None, (0, 0, 0)
    if not is_wanted or not _has_copy_engine(x.device):
        return none
    steps = []
    for z in (x, y):
        by_token, by_head, _ = z.stride()
        size = z.element_size()
        fits = z.data_ptr() % 16 == 0 and by_token * size % 16 == 0 and by_head * size % 16 == 0
        if not fits or block_dim(z.shape[-1]) != z.shape[-1] or by_token <= 0 or not z.numel():
            return none
        steps.append((by_head // by_token, 0) if by_head % by_token == 0 else (0, by_head))
    (x_rows, x_columns), (y_rows, y_columns) = steps
    tokens, heads = x.shape[:2]
    # Coordinates are 32 bits wide.
    furthest = max(tokens + heads * x_rows, heads * max(x_columns, y_columns))
    if x_rows != y_rows or furthest >= 2**31:
        return none
    x_box, y_box = _box(x, x_rows, x_columns, block), _box(y, y_rows, y_columns, block)
    return x_box, y_box, (x_rows, x_columns, y_columns)


def _box(x: Tensor, rows: int, columns: int, block: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    tokens, heads, dim = x.shape
    shape = [tokens + (heads - 1) * rows, (heads - 1) * columns + dim]
    return TensorDescriptor(x, shape, [x.stride(0), 1], [block, dim])

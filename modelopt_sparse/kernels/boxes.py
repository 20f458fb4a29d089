"""Keys and values as tensor descriptors, which a GPU's copy engine reads in tiles."""

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
    k: Tensor, v: Tensor, block_n: int, is_wanted: bool = True
) -> tuple[Any, Any, tuple[int, int, int]]:
    """Descriptors of `k` and `v`, and what a head adds to their coordinates.

    None where they aren't wanted, or where the GPU or the strides forbid.

    Returns:
        k_boxes, v_boxes: of rows of D channels, in tiles [block_n, D].
        steps: rows from head to head (of both), channels from head to head of k and of v.
    """
    none = None, None, (0, 0, 0)
    if not is_wanted or not _has_copy_engine(k.device):
        return none
    steps = []
    for x in (k, v):
        by_token, by_head, _ = x.stride()
        size = x.element_size()
        fits = x.data_ptr() % 16 == 0 and by_token * size % 16 == 0 and by_head * size % 16 == 0
        if not fits or block_dim(x.shape[-1]) != x.shape[-1] or by_token <= 0 or not x.numel():
            return none
        steps.append((by_head // by_token, 0) if by_head % by_token == 0 else (0, by_head))
    (k_rows, k_columns), (v_rows, v_columns) = steps
    tokens, heads = k.shape[:2]
    # Coordinates are 32 bits wide.
    furthest = max(tokens + heads * k_rows, heads * max(k_columns, v_columns))
    if k_rows != v_rows or furthest >= 2**31:
        return none
    k_box, v_box = _box(k, k_rows, k_columns, block_n), _box(v, v_rows, v_columns, block_n)
    return k_box, v_box, (k_rows, k_columns, v_columns)


def _box(x: Tensor, rows: int, columns: int, block_n: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    tokens, heads, dim = x.shape
    shape = [tokens + (heads - 1) * rows, (heads - 1) * columns + dim]
    return TensorDescriptor(x, shape, [x.stride(0), 1], [block_n, dim])

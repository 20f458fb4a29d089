"""Lists of the tiles that a program computes, so that it walks these and no others."""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt_sparse.errors import UnsupportedCall, describe

from .programs.lists import row_lists_kernel
from .tiles import WORD_BITS

Lists = tuple[Tensor, Tensor, Tensor]
NO_LISTS = (None, None, None)


def empty_lists(
    count: tuple[int, int], length: int, lengths: tuple[int, ...], device: torch.device
) -> Lists:
    """Room for `count` lists: entries, the row tiles that compute each, and how many there are.

    Args:
        length: entries that a list holds. lengths: shape of the numbers of entries of one list.
    Raises:
        UnsupportedCall: an entry would be more than 16 bits wide.
    """
    if length > 2**15:
        remedy = "Use larger decision tiles, or attention_reference (backend 'pytorch')."
        got = f"{length} tiles in a row or column"
        raise UnsupportedCall(describe("this call", got, f"at most {2**15} in a list", remedy))
    return (
        torch.empty((*count, length), dtype=torch.int16, device=device),
        torch.empty((*count, length), dtype=torch.uint8, device=device),
        torch.empty((*count, *lengths), dtype=torch.int32, device=device),
    )


def row_lists(words: Tensor, n_lists: int, groups: int) -> Lists:
    """The key tiles of each row block, the last first.

    Args:
        words: contiguous int32 [slots, Hq, n_words], as of a `TileMap`.
        n_lists: row blocks. groups: row tiles of each.
    """
    heads, n_words = words.shape[1:]
    length = n_words * WORD_BITS
    lists = empty_lists((n_lists, heads), length, (), words.device)
    row_lists_kernel[(n_lists, heads)](words, *lists, heads, n_words, length, groups, num_warps=4)
    return lists

"""Lists of the tiles that a program computes, so that it walks these and no others."""

from __future__ import annotations

import torch
from torch import Tensor

from modelopt_sparse.errors import UnsupportedCall, describe

from .programs.lists import row_lists_kernel
from .tiles import WORD_BITS

Lists = tuple[Tensor | None, Tensor | None, Tensor | None]
NO_LISTS: Lists = (None, None, None)


def empty_lists(
    count: tuple[int, int], tiles: int, heads: int, lengths: tuple[int, ...], device: torch.device
) -> Lists:
    """Room for `count` lists: entries, a tag of each, and how many there are.

    Args:
        tiles: in a row or column; entries name them. heads: tags name them.
        lengths: shape of the numbers of entries of one list.
    Raises:
        UnsupportedCall: an entry or a tag would be more than 16 bits wide.
    """
    if tiles > 2**15 or heads > 2**8:
        remedy = "Use larger decision tiles, or attention_reference (backend 'pytorch')."
        got = f"{tiles} tiles in a row or column, {heads} query heads to a KV head"
        takes = f"at most {2**15} and {2**8} in a list"
        raise UnsupportedCall(describe("this call", got, takes, remedy))
    return (
        torch.empty((*count, tiles * heads), dtype=torch.int16, device=device),
        torch.empty((*count, tiles * heads), dtype=torch.uint16, device=device),
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
    lists = empty_lists((n_lists, heads), length, 1, (), words.device)
    row_lists_kernel[(n_lists, heads)](words, *lists, heads, n_words, length, groups, num_warps=4)
    return lists

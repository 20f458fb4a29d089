"""Skip-softmax in other orders of visits, as choices of tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from examples.quality.selectors import Prompt, Selector


def _margin(order: Callable[[int, int], list[int]]) -> Selector:
    """How far the tile's scores come to the largest before, in the best row: skip-softmax in another order.

    Args:
        order: the tiles in the order of the visit, given the last one that a row tile sees and their number.
    """

    def margins(prompt: Prompt) -> Tensor:
        tiles = []
        for rows, scores in prompt.row_tiles():
            by_tile = scores.view(*scores.shape[:3], -1, prompt.block_keys)
            highest = by_tile.amax(-1)  # [Hq, C, R, T]
            ends = rows[:, -1].clamp(max=prompt.q.shape[1] - 1) // prompt.block_keys
            visits = [order(last, highest.shape[-1]) for last in ends.tolist()]
            visit = torch.tensor(visits, device=rows.device)[:, None].expand_as(highest)
            seen = highest.gather(3, visit)
            margin = (seen - seen.cummax(-1).values).nan_to_num(-torch.inf).amax(2)
            tiles.append(torch.empty_like(margin).scatter_(2, visit[:, :, 0], margin))
        return torch.cat(tiles, 1)

    return margins


def _left_to_right(last: int, count: int) -> list[int]:
    return list(range(count))


def _last_downward(last: int, count: int) -> list[int]:
    return [*range(last, -1, -1), *range(last + 1, count)]


def _last_first_downward(last: int, count: int) -> list[int]:
    return list(dict.fromkeys([last, 0, *_last_downward(last, count)]))


ORDERS: Mapping[str, Selector] = {
    "last, first, downward": _margin(_last_first_downward),
    "last, downward": _margin(_last_downward),
    "left to right": _margin(_left_to_right),
}
"""Skip-softmax in its own order of visits and in others, by the names that tables show. Of each head there
is one lambda, which is that of as many tiles.
"""

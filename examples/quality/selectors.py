"""Other ways to choose which tiles to compute, as plain torch: what skip-softmax is compared with.

Each gives every tile of a prompt a score; the tiles with the highest are kept. They are the ideas of
published methods, not their code, and compute what they rank: they show what a choice costs, not how fast
it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Of XAttention, the distance between antidiagonals; of MInference, the rows that its lines are found from.
_STRIDE, _LAST_ROWS = 8, 64
_ROWS_AT_ONCE = 512


class Prompt(NamedTuple):
    """One sequence of a causal call, in fp32.

    Args:
        q: [Hq, n, D], scaled. k: [Hq, n, D].
        block_rows, block_keys: the tile.
    """

    q: Tensor
    k: Tensor
    block_rows: int
    block_keys: int

    def row_tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Some row tiles after others: positions [C, R], and scores [Hq, C, R, N] over whole key tiles.

        -inf is hidden; so are all keys in rows behind the last one.
        """
        n = self.q.shape[1]
        keys = torch.arange(-(-n // self.block_keys) * self.block_keys, device=self.q.device)
        k = torch.nn.functional.pad(self.k, (0, 0, 0, len(keys) - n))
        at_once = max(_ROWS_AT_ONCE // self.block_rows, 1) * self.block_rows
        for start in range(0, n, at_once):
            end = min(start + at_once, -(-n // self.block_rows) * self.block_rows)
            rows = torch.arange(start, end, device=self.q.device)
            scores = self.q[:, rows.clamp(max=n - 1)] @ k.transpose(1, 2)
            scores.masked_fill_((keys > rows[:, None]) | (rows[:, None] >= n), -torch.inf)
            yield (
                rows.view(-1, self.block_rows),
                scores.view(len(scores), -1, self.block_rows, len(keys)),
            )

    def by_tile(self, values: Tensor) -> Tensor:
        """The sum of each tile: [Hq, C, R, N] -> [Hq, C, T]."""
        return values.view(*values.shape[:3], -1, self.block_keys).sum((2, 4))


Selector = Callable[[Prompt], Tensor]
"""Scores [Hq, row tiles, key tiles]."""


def top_mass(prompt: Prompt) -> Tensor:
    """The oracle: the weight that the tile has."""
    tiles = [prompt.by_tile(scores.softmax(-1).nan_to_num(0.0)) for _, scores in prompt.row_tiles()]
    return torch.cat(tiles, 1)


def random_tiles(prompt: Prompt) -> Tensor:
    """Chance. The same each time."""
    shape = _shape(prompt)
    generator = torch.Generator().manual_seed(0)
    return torch.rand(shape, generator=generator).to(prompt.q.device)


def window_and_sink(prompt: Prompt) -> Tensor:
    """The first tile, then the nearest. Source: StreamingLLM (arXiv 2309.17453)."""
    heads, rows, keys = _shape(prompt)
    row, key = (torch.arange(size, device=prompt.q.device) for size in (rows, keys))
    nearness = (key * prompt.block_keys - row[:, None] * prompt.block_rows).float()
    nearness[:, 0] = torch.inf
    return nearness.expand(heads, rows, keys)


def mean_similarity(prompt: Prompt) -> Tensor:
    """The product of the tile's mean query and mean key. Source: SpargeAttention (arXiv 2502.18137)."""
    q, k = (
        _means(x, size)
        for x, size in ((prompt.q, prompt.block_rows), (prompt.k, prompt.block_keys))
    )
    return q @ k.transpose(1, 2)


def antidiagonal(prompt: Prompt) -> Tensor:
    """The weight of the tile by every eighth antidiagonal. Source: XAttention (arXiv 2503.16428)."""
    tiles = []
    for _, scores in prompt.row_tiles():
        heads, count, rows, keys = scores.shape
        squares = scores.view(heads, count, rows // _STRIDE, _STRIDE, keys // _STRIDE, _STRIDE)
        line = squares.flip(-1).diagonal(dim1=3, dim2=5)  # [Hq, C, R / 8, N / 8, 8]
        seen = line.isfinite()
        means = line.masked_fill(~seen, 0.0).sum(-1) / seen.sum(-1).clamp(min=1)
        weights = means.masked_fill(~seen.any(-1), -torch.inf).softmax(-1).nan_to_num(0.0)
        by_key_tile = weights.view(*weights.shape[:3], -1, prompt.block_keys // _STRIDE)
        tiles.append(by_key_tile.sum((2, 4)))
    return torch.cat(tiles, 1)


def vertical_slash(prompt: Prompt) -> Tensor:
    """What the last rows give to the tile's keys and distances. Source: MInference (arXiv 2407.02490)."""
    n = prompt.q.shape[1]
    last = torch.arange(max(n - _LAST_ROWS, 0), n, device=prompt.q.device)
    keys = torch.arange(n, device=prompt.q.device)
    distance = last[:, None] - keys
    scores = prompt.q[:, last] @ prompt.k.transpose(1, 2)
    weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
    vertical = weights.sum(1)  # [Hq, n]
    slash = torch.zeros_like(vertical).index_add_(
        1, distance.clamp(min=0).flatten(), weights.flatten(1)
    )
    tiles = []
    for rows, seen in prompt.row_tiles():
        columns = torch.arange(seen.shape[-1], device=rows.device)
        lines = slash[:, (rows[..., None] - columns).clamp(0, n - 1)]
        columns_mass = vertical[:, None, None, columns.clamp(max=n - 1)]
        tiles.append(prompt.by_tile((lines + columns_mass).masked_fill(seen == -torch.inf, 0.0)))
    return torch.cat(tiles, 1)


def _shape(prompt: Prompt) -> tuple[int, int, int]:
    heads, n, _ = prompt.q.shape
    return heads, math.ceil(n / prompt.block_rows), math.ceil(n / prompt.block_keys)


def _means(x: Tensor, size: int) -> Tensor:
    """The mean of each tile: [Hq, n, D] -> [Hq, tiles, D]."""
    return torch.stack([part.mean(1) for part in torch.split(x, size, dim=1)], 1)


SELECTORS: Mapping[str, Selector] = {
    "oracle": top_mass,
    "antidiagonal": antidiagonal,
    "vertical-slash": vertical_slash,
    "mean similarity": mean_similarity,
    "window and sink": window_and_sink,
    "random": random_tiles,
}
"""By the names that tables show."""

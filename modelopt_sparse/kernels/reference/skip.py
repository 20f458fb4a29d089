"""Which decision tiles skip-softmax skips. Source: BLASST (arXiv 2512.12087).

A tile is skipped when every row that sees something in it has its largest score there below that row's
running max plus log2(lambda). Because lambda <= 1, a skipped tile never holds a row's running max: the
max over the tiles *kept* so far is the max over the tiles *visited* so far, so all decisions of a row
tile follow from prefix maxima at once, and skip sets are nested in lambda.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modelopt_sparse.kernels.device.bins import BINS, BINS_PER_OCTAVE


class Decisions(NamedTuple):
    """What is decided about the tiles of some rows, under each of n thresholds.

    Args:
        visible: bool [Hq, row tiles, T].
        skipped: bool [n, Hq, row tiles, T].
        bins: int64 [Hq, row tiles, T], in `TileCounts.histogram`; -1 where nothing is visible.
    """

    visible: Tensor
    skipped: Tensor
    bins: Tensor

    def histogram(self) -> Tensor:
        """How many tiles are in each bin: int64 [BINS, Hq]."""
        flat = self.bins.flatten(1)  # [Hq, row tiles * T]
        counts = flat.new_zeros(flat.shape[0], BINS + 1)
        return counts.scatter_add_(1, flat + 1, torch.ones_like(flat))[:, 1:].T


def tile_maxima(scores: Tensor, block_keys: int) -> Tensor:
    """Each row's largest score in each key tile: [Hq, R, N] -> [Hq, R, T]; -inf where it sees nothing."""
    return scores.view(*scores.shape[:-1], -1, block_keys).amax(-1)


def of_row_tiles(values: Tensor, row_tile: Tensor, n_row_tiles: int) -> Tensor:
    """The largest of each row tile: [Hq, R, T] -> [Hq, n_row_tiles, T]."""
    index = row_tile[:, None].expand(values.shape)
    shape = values.shape[0], n_row_tiles, values.shape[2]
    lowest = 0 if values.dtype == torch.uint8 else -torch.inf
    return values.new_full(shape, lowest).scatter_reduce(1, index, values, "amax")


def prefill_decisions(
    maxima: Tensor, row_tile: Tensor, n_row_tiles: int, log2_thresholds: Tensor
) -> Decisions:
    """Decisions of sequences that prefill.

    Args:
        maxima: [Hq, R, T], from `tile_maxima`.
        row_tile: int64 [R], the row tile of each row, from 0.
        log2_thresholds: [n, Hq], n thresholds that decide independently.
    """

    def any_row(flags: Tensor) -> Tensor:
        return of_row_tiles(flags.to(torch.uint8), row_tile, n_row_tiles).bool()

    visible = any_row(maxima != -torch.inf)
    order = visit_order(visible)[:, row_tile]  # [Hq, R, T]
    visited = maxima.gather(-1, order)
    before = torch.full_like(maxima, -torch.inf)
    before[..., 1:] = visited.cummax(-1).values[..., :-1]
    running = torch.empty_like(maxima).scatter_(-1, order, before)
    skipped = [visible & ~any_row(_vetoes(maxima, running, row)) for row in log2_thresholds]
    distances = of_row_tiles(_distances(maxima, running), row_tile, n_row_tiles)
    return Decisions(visible, torch.stack(skipped), _bins(distances, visible))


def visit_order(visible: Tensor) -> Tensor:
    """The order in which a row tile visits its key tiles: the last visible one, the first, then downward.

    So the local maximum and the attention sink are both seen before the first decision.

    Args:
        visible: bool [..., T].
    Returns:
        int64 [..., T], a permutation of the tiles; the invisible ones come at the end.
    """
    tiles = visible.shape[-1]
    index = torch.arange(tiles, device=visible.device).expand(visible.shape)
    first = torch.where(visible, index, tiles).amin(-1, keepdim=True)
    last = torch.where(visible, index, -1).amax(-1, keepdim=True)
    priority = torch.where(visible, index, -1)
    priority = torch.where(index == first, tiles, priority)
    priority = torch.where(index == last, tiles + 1, priority)
    return priority.argsort(dim=-1, descending=True, stable=True)


def decode_decisions(
    maxima: Tensor, segment_tiles: int, voters: int, log2_thresholds: Tensor
) -> Decisions:
    """Decisions of sequences that decode: fixed segments of tiles, visited downward from a seed.

    Each segment's running max starts from the max over the row's last and first visible tiles, so that no
    decision depends on how segments are spread over programs.

    Args:
        maxima: [Hq, R, T], from `tile_maxima`; tile 0 is at position 0.
        segment_tiles: tiles of a segment.
        voters: consecutive query heads that vote together, with all their rows.
        log2_thresholds: [n, Hq].
    Returns:
        of one row tile a head.
    """
    heads, rows, tiles = maxima.shape
    sees = maxima != -torch.inf
    index = torch.arange(tiles, device=maxima.device).expand(maxima.shape)
    first = torch.where(sees, index, tiles - 1).amin(-1, keepdim=True)
    last = torch.where(sees, index, 0).amax(-1, keepdim=True)
    seed = torch.maximum(maxima.gather(-1, first), maxima.gather(-1, last))  # [Hq, R, 1]

    padding = -tiles % segment_tiles
    segments = torch.nn.functional.pad(maxima, (0, padding), value=-torch.inf)
    downward = segments.view(heads, rows, -1, segment_tiles).flip(-1)  # [Hq, R, S, segment_tiles]
    before = torch.full_like(downward, -torch.inf)
    before[..., 1:] = downward.cummax(-1).values[..., :-1]
    running = torch.maximum(before.flip(-1).flatten(-2)[..., :tiles], seed)

    def of_group(values: Tensor) -> Tensor:
        """The largest of each group of voters: [Hq, R, T] -> [Hq, 1, T]."""
        groups = values.reshape(heads // voters, voters * rows, tiles).amax(1, keepdim=True)
        return groups.repeat_interleave(voters, 0)

    visible = of_group(sees)
    skipped = [visible & ~of_group(_vetoes(maxima, running, row)) for row in log2_thresholds]
    distances = of_group(_distances(maxima, running))
    return Decisions(visible, torch.stack(skipped), _bins(distances, visible))


def _vetoes(maxima: Tensor, running: Tensor, log2_threshold: Tensor) -> Tensor:
    """Rows that see something in the tile and need it. A NaN anywhere compares false, so it vetoes."""
    below = maxima < running + log2_threshold.to(maxima.dtype)[:, None, None]
    return ~below & (maxima != -torch.inf)


def _distances(maxima: Tensor, running: Tensor) -> Tensor:
    """How far a row's largest score lies above its running max, log2: inf in its first tile, and for NaN."""
    distance = (maxima - running).nan_to_num(torch.inf, torch.inf, -torch.inf)
    return distance.masked_fill(maxima == -torch.inf, -torch.inf)


def _bins(distances: Tensor, visible: Tensor) -> Tensor:
    place = (-distances * BINS_PER_OCTAVE).ceil().clamp(0, BINS - 1).long()
    return place.masked_fill(~visible, -1)

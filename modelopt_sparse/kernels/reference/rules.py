"""What one sequence leaves out, by its phase."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from modelopt_sparse.kernels.check import Call
from modelopt_sparse.kernels.thresholds import log2_threshold
from modelopt_sparse.kernels.types import NMSparsity, Phase, SkipSoftmax, SkipSoftmaxDecode

from .sequence import Sequence
from .skip import Decisions, decode_decisions, prefill_decisions, tile_maxima


@dataclass(frozen=True, eq=False)
class Rules:
    """The parts of the plan that a sequence's phase has.

    Args:
        log2_thresholds: [1 + counted, Hq], row 0 in force; None where nothing is skipped.
        given: bool [Hq, row tiles, key tiles], in place of decisions, the tiles to compute.
        block_rows, block_keys: the tile that is decided on or given; no rows: all of them are one tile.
    """

    nm: NMSparsity | None = None
    skip: SkipSoftmax | SkipSoftmaxDecode | None = None
    log2_thresholds: Tensor | None = None
    given: Tensor | None = None
    block_rows: int | None = None
    block_keys: int = 0

    @classmethod
    def of(cls, call: Call, index: int, n_q: int, given: Tensor | None = None) -> Rules:
        """The rules for sequence `index`, which has `n_q` query rows and the `given` tiles, if any."""
        phase = Phase.of(n_q, call.phase)
        nm = call.plan.nm if phase is Phase.PREFILL else None
        skip = call.plan.skip if phase is Phase.PREFILL else call.plan.skip_decode
        if phase is Phase.PREFILL and call.plan.tiles is not None:
            tiles = call.plan.tiles
            return cls(nm, None, None, given, tiles.block_rows, tiles.block_keys)
        if skip is None:
            return cls(nm)
        batch, heads, device = call.seqs.q_len.shape[0], call.q.shape[1], call.q.device
        in_force = log2_threshold(skip.threshold, batch, heads, device)[index]
        counted = [log2_threshold(value, 1, heads, device)[0] for value in skip.count_thresholds]
        thresholds = torch.stack([in_force, *counted])
        block_rows = skip.block_rows if isinstance(skip, SkipSoftmax) else None
        return cls(nm, skip, thresholds, None, block_rows, skip.block_keys)

    def decide(self, scores: Tensor, sequence: Sequence, rows: slice) -> Decisions:
        """What is decided about the tiles of a row block: under the threshold in force, then the counted.

        Args:
            scores: [Hq, R, N] after N:M; the first key is at a multiple of the tile (in decode, of the
                segment).
        """
        skip, thresholds = self.skip, self.log2_thresholds
        assert skip is not None and thresholds is not None
        maxima = tile_maxima(scores.detach(), skip.block_keys)
        if isinstance(skip, SkipSoftmaxDecode):
            voters = skip.vote_heads or sequence.q.shape[1] // sequence.k.shape[0]
            return decode_decisions(
                maxima, skip.segment_keys // skip.block_keys, voters, thresholds
            )
        tile = self.row_tile(sequence, rows)
        tile = tile - tile[0]
        return prefill_decisions(maxima, tile, int(tile[-1]) + 1, thresholds)

    def kept_of_given(self, sequence: Sequence, rows: slice, keys: slice) -> Tensor | None:
        """The given tiles of each row: bool [Hq, R, T]; None where none are given.

        Args:
            keys: from and to multiples of the tile. Those past the sequence's are of no tile.
        """
        if self.given is None:
            return None
        first, stop = keys.start // self.block_keys, keys.stop // self.block_keys
        tiles = pad(self.given, (0, max(0, stop - self.given.shape[-1])))
        return tiles[:, self.row_tile(sequence, rows), first:stop]

    def row_tile(self, sequence: Sequence, rows: slice) -> Tensor:
        """The row tile that each row belongs to, counted from the sequence's first: int64 [R]."""
        if self.block_rows is None:
            return torch.zeros_like(sequence.rows[rows])
        tile = sequence.rows.div(self.block_rows, rounding_mode="floor")
        return tile[rows] - tile[0]

"""Which share of tiles each lambda skips."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from modelopt_sparse.errors import ArgumentError, describe
from modelopt_sparse.kernels.device.bins import BINS, BINS_PER_OCTAVE


@dataclass(frozen=True, eq=False)
class Curve:
    """The share of visible tiles that skip-softmax skips, by lambda.

    Exact at the edges of the bins, which are 9 % of lambda apart; between them, linear in log(lambda).

    Args:
        counts: [BINS], tiles of a histogram (`TileCounts.histogram`) or of several; any weights.
    """

    counts: Tensor

    @classmethod
    def of(cls, histograms: Iterable[Tensor]) -> Curve:
        """The curve of all heads of histograms [BINS, Hq] together.

        Raises:
            ArgumentError: there are no tiles in them.
        """
        counts = sum((x.sum(1).cpu() for x in histograms), torch.zeros(BINS, dtype=torch.int64))
        if not counts.sum():
            raise ArgumentError(describe("histograms", "no tiles", "those of at least one call"))
        return cls(counts)

    @cached_property
    def _edges(self) -> tuple[list[float], list[float]]:
        """log2(lambda) and the share skipped there, both rising."""
        falls_above = self.counts.flip(0).cumsum(0)[:-1]  # of the last bin, of the last two, ...
        shares: list[float] = (falls_above.double() / self.counts.sum()).tolist()
        return [-edge / BINS_PER_OCTAVE for edge in range(BINS - 2, -1, -1)], shares

    @property
    def most(self) -> float:
        """What is skipped at lambda 1: no lambda skips more."""
        return self._edges[1][-1]

    def share(self, threshold: float) -> float:
        """The share of tiles that fall at a lambda from 0 to 1; 0 below the last edge, 2^-31.75."""
        edges, shares = self._edges
        if not threshold or math.log2(threshold) < edges[0]:
            return 0.0
        return _interpolated(math.log2(threshold), edges, shares)

    def threshold(self, share: float) -> float:
        """The least lambda that skips this share of tiles: 1 where none skips so much, 0 for nothing.

        Raises:
            ArgumentError: it is no share.
        """
        if not 0 <= share < 1:
            raise ArgumentError(describe("share", share, "a number from 0 to 1, and not 1"))
        edges, shares = self._edges
        if share == 0:
            return 0.0
        if share > shares[-1]:
            return 1.0
        return math.exp2(_interpolated(share, shares, edges))


def _interpolated(x: float, xs: list[float], ys: list[float]) -> float:
    """y at x, linear between the first point that isn't below x and the one before; there are such points."""
    after = bisect_left(xs, x)
    if after == 0:
        return ys[0]
    part = (x - xs[after - 1]) / (xs[after] - xs[after - 1])
    return ys[after - 1] + part * (ys[after] - ys[after - 1])

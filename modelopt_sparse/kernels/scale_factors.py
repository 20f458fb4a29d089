"""Lambda by length: a scale factor over the sequence's own number of keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from modelopt_sparse.errors import ArgumentError, describe

from .check_values import check_int
from .thresholds import check_factor


@dataclass(frozen=True)
class ScaleFactors:
    """Scale factors for some lengths. Between two of them log(factor) is linear in log(length); before the
    first and after the last it stays what it is there.

    Args:
        lengths: numbers of keys, rising.
        factors: for each length a number above 0, or one for each query head.

    Raises:
        ArgumentError, ArgumentTypeError: they are no such numbers, or not as many.
    """

    lengths: tuple[int, ...]
    factors: tuple[float | tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for length in self.lengths:
            check_int("lengths", length, least=1)
        if any(after <= before for before, after in pairwise(self.lengths)):
            raise ArgumentError(describe("lengths", self.lengths, "numbers that rise"))
        if not self.lengths or len(self.factors) != len(self.lengths):
            got = f"{len(self.factors)} for {len(self.lengths)} lengths"
            raise ArgumentError(
                describe("factors", got, "one entry for each length, and one at least")
            )
        if len({len(row) for row in self._rows}) > 1 or not self._rows[0]:
            got = f"rows of {[len(row) for row in self._rows]} heads"
            raise ArgumentError(describe("factors", got, "one factor for each head"))
        for factor in (factor for row in self._rows for factor in row):
            if not check_factor("factors", factor):
                raise ArgumentError(describe("factors", factor, "numbers above 0"))

    @property
    def heads(self) -> int:
        """How many query heads there is a factor for; 1 where they share it."""
        return len(self._rows[0])

    @property
    def _rows(self) -> list[tuple[float, ...]]:
        return [row if isinstance(row, tuple) else (row,) for row in self.factors]

    def thresholds(self, n_k: Tensor) -> Tensor:
        """Lambda of sequences of `n_k` [B] keys: fp64 [B, Hq], or [B, 1] where heads share; at most 1."""
        line = _line(self, n_k.device)
        length = n_k.clamp(min=1)[:, None].double().log2()
        way = (length - line.starts).clamp(min=0).minimum(line.widths)  # [B, pieces]
        log2 = line.first + (way[:, :, None] * line.slopes).sum(1)  # [B, heads]
        return (log2 - length).exp2().clamp(max=1.0)


class _Line(NamedTuple):
    """A line of several pieces over log2(length), in fp64.

    Args:
        first: [heads], log2 of the factor at the first length.
        starts, widths: [pieces]. slopes: [pieces, heads].
    """

    first: Tensor
    starts: Tensor
    widths: Tensor
    slopes: Tensor


# Kept, for to fill a tensor waits for the device.
@lru_cache(maxsize=4096)
def _line(scale: ScaleFactors, device: torch.device) -> _Line:
    lengths = [math.log2(length) for length in scale.lengths]
    rows = [[math.log2(factor) for factor in row] for row in scale._rows]
    widths = [after - before for before, after in pairwise(lengths)]
    slopes = [
        [(high - low) / width for low, high in zip(before, after, strict=True)]
        for (before, after), width in zip(pairwise(rows), widths, strict=True)
    ]

    def tensor(values: object, *shape: int) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device).view(shape)

    pieces = len(widths)
    return _Line(
        tensor(rows[0], -1),
        tensor(lengths[:-1], pieces),
        tensor(widths, pieces),
        tensor(slopes, pieces, scale.heads),
    )

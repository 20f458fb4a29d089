"""Lambda by length: a scale factor over the sequence's own number of keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

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

    Attributes:
        heads: how many query heads there is a factor for; 1 where they share it.

    Raises:
        ArgumentError, ArgumentTypeError: they are no such numbers, or not as many.
    """

    lengths: tuple[int, ...]
    factors: tuple[float | tuple[float, ...], ...]
    heads: int = field(init=False, repr=False, compare=False)
    _lines: dict[torch.device, _Line] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __reduce__(self) -> tuple[Any, ...]:
        return ScaleFactors, (self.lengths, self.factors)

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
        # Kept: reading the factors would tie a compiled graph to them.
        object.__setattr__(self, "heads", len(self._rows[0]))

    @property
    def _rows(self) -> list[tuple[float, ...]]:
        return [row if isinstance(row, tuple) else (row,) for row in self.factors]

    def prepare(self, device: torch.device) -> _Line:
        """What `thresholds` needs on a device, kept: to fill a tensor waits for the device.

        Done before a compiler traces `thresholds`, the numbers aren't constants of its graph, and others can
        take their place without another one.
        """
        if device not in self._lines:
            self._lines[device] = _line(self, device)
        line = self._lines[device]
        if _is_captured(device):
            _of_graphs.add(line)
        return line

    def thresholds(self, n_k: Tensor) -> Tensor:
        """Lambda of sequences of `n_k` [B] keys: fp64 [B, Hq], or [B, 1] where heads share; at most 1."""
        line = self.prepare(n_k.device)
        if len(self.lengths) == 1:
            return (line.factor / n_k[:, None]).clamp(max=1.0)
        length = n_k[:, None].double().log2()  # -inf for none
        way = (length - line.starts).clamp(line.zero, line.widths)  # [B, pieces]
        log2 = line.first + (way[:, :, None] * line.slopes).sum(1)  # [B, heads]
        return log2.exp2().clamp(max=1.0)


class _Line(NamedTuple):
    """log2(lambda) as a line of several pieces over log2(length), in fp64.

    Args:
        factor: [heads], at the first length.
        first: [heads], log2(lambda) at length 1.
        starts, widths: [pieces], the last one infinitely wide. slopes: [pieces, heads].
        zero: the number.
    """

    factor: Tensor
    first: Tensor
    starts: Tensor
    widths: Tensor
    slopes: Tensor
    zero: Tensor


# A CUDA graph that was captured reads these in every replay, whatever became of the factors.
_of_graphs: set[_Line] = set()


def _is_captured(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and not torch.compiler.is_compiling()
        and torch.cuda.is_current_stream_capturing()
    )


def _line(scale: ScaleFactors, device: torch.device) -> _Line:
    lengths = [math.log2(length) for length in scale.lengths]
    rows = [[math.log2(factor) for factor in row] for row in scale._rows]
    widths = [after - before for before, after in pairwise(lengths)]
    # Of lambda: it falls as the length rises. Before the first length and after the last the factor stays.
    stays = [-1.0] * scale.heads
    slopes = [
        [(high - low) / width - 1.0 for low, high in zip(before, after, strict=True)]
        for (before, after), width in zip(pairwise(rows), widths, strict=True)
    ]

    def tensor(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    return _Line(
        factor=tensor(scale._rows[0]),
        first=tensor(rows[0]),
        starts=tensor([0.0, *lengths]),
        widths=tensor([lengths[0], *widths, math.inf]),
        slopes=tensor([stays, *slopes, stays]),
        zero=tensor(0.0),
    )

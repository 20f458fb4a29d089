"""Counts of one variant on one task at one length; those of several runs add up."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from modelopt_sparse.errors import ArgumentError, describe
from modelopt_sparse.faithfulness.intervals import (
    Interval,
    mean_interval,
    paired_interval,
    share_interval,
)

CONFIDENCE = 0.95
TEXT = "text"
"""The task of predicting text."""


@dataclass(frozen=True)
class Cell:
    """What was found of one variant on the samples of one task and length.

    Args:
        group, variant, task, length: which. `TEXT` is no task but text to predict.
        samples, seeds: how many, and what chose them.
        dense, sparse: of a task, how many were answered exactly, without and with skipping.
        lost, gained: of these, those that only the dense, and only the sparse model answered.
        dense_bits, sparse_bits: of text, bits per byte of each window.
        visible, skipped: tiles, summed over samples, layers and heads; 0 where nothing was counted.
    """

    group: str
    variant: str
    task: str
    length: int
    samples: int
    seeds: tuple[int, ...]
    dense: int = 0
    sparse: int = 0
    lost: int = 0
    gained: int = 0
    dense_bits: tuple[float, ...] = ()
    sparse_bits: tuple[float, ...] = ()
    visible: int = 0
    skipped: int = 0

    @property
    def place(self) -> tuple[str, str, str, int]:
        """What it is of."""
        return self.group, self.variant, self.task, self.length

    def __add__(self, other: Cell) -> Cell:
        """Both samples together.

        Raises:
            ArgumentError: they are of two places, or of one seed, which are the same samples twice.
        """
        if self.place != other.place:
            raise ArgumentError(describe("cells", f"{self.place} and {other.place}", "one place"))
        if both := set(self.seeds) & set(other.seeds):
            got = f"{self.place} twice with seed {', '.join(map(str, sorted(both)))}"
            raise ArgumentError(describe("cells", got, "each seed once"))
        parts = ("samples", "dense", "sparse", "lost", "gained", "visible", "skipped")
        sums = {name: getattr(self, name) + getattr(other, name) for name in parts}
        return replace(
            self,
            **sums,
            seeds=self.seeds + other.seeds,
            dense_bits=self.dense_bits + other.dense_bits,
            sparse_bits=self.sparse_bits + other.sparse_bits,
        )

    @property
    def sparsity(self) -> float | None:
        """Tiles skipped over tiles visible."""
        return self.skipped / self.visible if self.visible else None

    @property
    def drop(self) -> float:
        """Share of samples answered by the dense model, minus share answered by the sparse one."""
        return (self.lost - self.gained) / self.samples

    @property
    def drop_interval(self) -> Interval:
        """Of `drop`, over samples that both models answered."""
        return paired_interval(self.lost, self.gained, self.samples, CONFIDENCE)

    @property
    def points(self) -> float:
        """Per cent of samples answered by the sparse model, minus those by the dense one."""
        return 100 * (self.gained - self.lost) / self.samples

    @property
    def points_interval(self) -> Interval:
        """Of `points`."""
        low, high = self.drop_interval
        return -100 * high, -100 * low

    @property
    def sparse_interval(self) -> Interval:
        """Wilson's, of the share that the sparse model answered."""
        return share_interval(self.sparse, self.samples, CONFIDENCE)

    @property
    def dense_interval(self) -> Interval:
        """Wilson's, of the share that the dense model answered."""
        return share_interval(self.dense, self.samples, CONFIDENCE)

    @property
    def more_bits(self) -> float:
        """Bits per byte of the sparse model minus those of the dense one."""
        return (sum(self.sparse_bits) - sum(self.dense_bits)) / self.samples

    @property
    def more_bits_interval(self) -> Interval | None:
        """Student's, over windows; None for a single one."""
        pairs = zip(self.sparse_bits, self.dense_bits, strict=True)
        differences = [torch.tensor([a - b], dtype=torch.float64) for a, b in pairs]
        return mean_interval(differences, CONFIDENCE)


def added(cells: Iterable[Cell]) -> list[Cell]:
    """One cell for each place, in the order in which they first come.

    Raises:
        ArgumentError: two have the same samples.
    """
    found: dict[tuple[str, str, str, int], Cell] = {}
    for cell in cells:
        found[cell.place] = found[cell.place] + cell if cell.place in found else cell
    return list(found.values())


def save(path: Path, where: dict[str, str], cells: Sequence[Cell]) -> None:
    """Writes what was measured, and on what."""
    rows = ",\n".join(json.dumps(asdict(cell)) for cell in cells)
    path.write_text(f'{{"environment": {json.dumps(where)},\n"cells": [\n{rows}\n]}}\n')


def load(path: Path) -> tuple[dict[str, str], list[Cell]]:
    """What `save` wrote."""
    data = json.loads(path.read_text())
    many = ("seeds", "dense_bits", "sparse_bits")
    rows = [{**row, **{name: tuple(row[name]) for name in many}} for row in data["cells"]]
    return data["environment"], [Cell(**row) for row in rows]

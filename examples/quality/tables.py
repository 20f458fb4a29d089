"""Cells as Markdown, in the marked blocks of a page.

    python -m examples.quality.tables --into docs/quality.md

A block names a file and a group of variants, or ``tasks``, each task under each preset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from examples.quality.cells import TEXT, Cell, load
from examples.quality.variants import GROUPS
from examples.tiny_lm.tasks import TASKS
from modelopt_sparse.bench.blocks import Blocks
from modelopt_sparse.faithfulness.intervals import Interval

BLOCKS = Blocks("quality")
TASK_TABLE = "tasks"
PRESETS = "presets"


def summary(cell: Cell) -> str:
    """A cell in a line."""
    place = f"{cell.group} {cell.variant} {cell.task} {cell.length}, {cell.samples} samples: "
    skipped = "" if cell.sparsity is None else f", {cell.sparsity:.1%} skipped"
    if cell.task == TEXT:
        return f"{place}{_more(cell)} bits per byte{skipped}"
    return f"{place}{cell.dense} dense, {cell.sparse} sparse{skipped}"


@dataclass(frozen=True)
class Row:
    """One variant at one length.

    Args:
        text: what was found on text; None where it wasn't measured.
        tasks: what was found on tasks: those that all variants of that length were measured on, with the
            same samples.
    """

    length: int
    variant: str
    text: Cell | None
    tasks: Sequence[Cell]

    @property
    def worst(self) -> Cell | None:
        """The task that lost most, or gained least; None without tasks."""
        return max(self.tasks, key=lambda cell: cell.drop, default=None)


def rows(cells: Sequence[Cell], group: str) -> list[Row]:
    """The variants of a group that were measured, by length."""
    found = []
    own = sorted((cell for cell in cells if cell.group == group), key=lambda cell: cell.length)
    for length, of_length in groupby(own, key=lambda cell: cell.length):
        of_all = list(of_length)
        shared = _shared_tasks(of_all)
        measured = {cell.variant for cell in of_all}
        for variant in (each.name for each in GROUPS[group] if each.name in measured):
            of_task = {cell.task: cell for cell in of_all if cell.variant == variant}
            tasks = [of_task[name] for name in shared if name in of_task]
            found.append(Row(length, variant, of_task.get(TEXT), tasks))
    return found


def group_table(cells: Sequence[Cell], group: str) -> str:
    """Variants of a group by length: tiles skipped, bits per byte, and the task that lost most."""
    heads = (
        "length",
        group,
        "skipped",
        "in tasks",
        "bits per byte",
        "windows",
        "all tasks",
        "worst task",
        "of",
    )
    lines = _begin(heads)
    for row in rows(cells, group):
        text, worst = row.text, row.worst
        all_tasks = _together(row.tasks) if row.tasks else None
        lines.append(
            _line(
                f"{row.length}",
                row.variant,
                _skipped(text, group),
                _skipped(all_tasks, group),
                _more(text) if text else "",
                f"{text.samples}" if text else "",
                _points(all_tasks) if all_tasks else "",
                f"{worst.task} {_points(worst)}" if worst and worst.drop > 0 else "",
                f"{all_tasks.samples} of {_tasks(len(row.tasks))}" if all_tasks else "",
            )
        )
    return "\n".join(lines)


def tasks_table(cells: Sequence[Cell]) -> str:
    """Exact answers to each task in per cent, dense and under each preset, with Wilson's intervals.

    A preset that wasn't measured at a length has nothing there.
    """
    own = [cell for cell in cells if cell.group == PRESETS and cell.task != TEXT]
    measured = {cell.variant for cell in own}
    variants = [each.name for each in GROUPS[PRESETS] if each.name in measured]
    lines = _begin(("task", "length", "dense", *(f"`{name}`" for name in variants)))
    places = {(cell.task, cell.length) for cell in own}
    for task, length in sorted(places, key=lambda place: (list(TASKS).index(place[0]), place[1])):
        of_place = {
            cell.variant: cell for cell in own if (cell.task, cell.length) == (task, length)
        }
        first = next(iter(of_place.values()))
        shares = [_share(first.dense / first.samples, first.dense_interval)]
        for name in variants:
            cell = of_place.get(name)
            shares.append(_share(cell.sparse / cell.samples, cell.sparse_interval) if cell else "")
        lines.append(_line(task, str(length), *shares))
    return "\n".join(lines)


def refreshed(document: Path) -> str:
    """The text of a page with its blocks written anew from their files."""

    def content(file: Path, names: list[str]) -> str:
        where, cells = load(file)
        tables = [
            tasks_table(cells) if name == TASK_TABLE else group_table(cells, name) for name in names
        ]
        said = ", ".join(f"{name} {value}" for name, value in where.items() if value)
        return "\n\n".join([said, *tables]) + "\n"

    return BLOCKS.rewritten(document, content)


def _shared_tasks(cells: Sequence[Cell]) -> list[str]:
    """Tasks of which every variant that has any was given the same samples."""
    of_tasks = [cell for cell in cells if cell.task != TEXT]
    variants = {cell.variant for cell in of_tasks}
    found = []
    for task in TASKS:
        own = [cell for cell in of_tasks if cell.task == task]
        samples = {(cell.samples, frozenset(cell.seeds)) for cell in own}
        if len(samples) == 1 and {cell.variant for cell in own} == variants:
            found.append(task)
    return found


def _together(cells: Sequence[Cell]) -> Cell:
    """All tasks as one."""
    # Of one seed each task has samples of its own.
    first, *others = (replace(cell, task="all", seeds=()) for cell in cells)
    return sum(others, first)


def _tasks(count: int) -> str:
    return f"{count} task{'s' * (count != 1)}"


def _more(cell: Cell) -> str:
    interval = cell.more_bits_interval
    ends = "" if interval is None else f" ({interval[0]:+.4f} to {interval[1]:+.4f})"
    return f"{cell.more_bits:+.4f}{ends}"


def _points(cell: Cell) -> str:
    low, high = cell.points_interval
    return f"{cell.points:+.1f} ({low:+.1f} to {high:+.1f})"


def _skipped(cell: Cell | None, group: str) -> str:
    if cell is None:
        return ""
    # Tiles that are given aren't counted: they are as many as skip-softmax keeps.
    as_many = group in ("selectors", "orders")
    return f"{cell.sparsity:.1%}" if cell.sparsity is not None else "as many" * as_many


def _share(share: float, interval: Interval) -> str:
    return f"{100 * share:.1f} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _begin(heads: Sequence[str]) -> list[str]:
    return [_line(*heads), "|" + "---|" * len(heads)]


def _line(*parts: str) -> str:
    return f"| {' | '.join(parts)} |"


def main(
    into: Annotated[Path, typer.Option(help="A page, whose blocks are written anew.")],
) -> None:
    """Write the blocks of a page."""
    into.write_text(refreshed(into))


if __name__ == "__main__":
    typer.run(main)

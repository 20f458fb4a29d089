"""Cells as Markdown, in the marked blocks of a page, and their plots.

    python -m examples.quality.tables a.json b.json --json docs/quality/h200.json
    python -m examples.quality.tables docs/quality/h200.json --into docs/quality.md

A block begins with ``<!-- quality: GROUP -->`` or ``<!-- quality: tasks -->`` and ends with
``<!-- /quality -->``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from examples.quality.cells import TEXT, Cell, added, load, save
from modelopt_sparse.faithfulness.intervals import Interval

BLOCK = re.compile(r"(<!-- quality: (\w+) -->\n).*?(<!-- /quality -->)", flags=re.DOTALL)
PRESETS = "presets"


def summary(cell: Cell) -> str:
    """A cell in a line."""
    place = f"{cell.group} {cell.variant} {cell.task} {cell.length}, {cell.samples} samples: "
    skipped = "" if cell.sparsity is None else f", {cell.sparsity:.1%} skipped"
    if cell.task == TEXT:
        return f"{place}{_more(cell)} bits per byte{skipped}"
    return f"{place}{cell.dense} dense, {cell.sparse} sparse{skipped}"


def group_table(cells: Sequence[Cell], group: str) -> str:
    """Variants of a group by length: tiles skipped, bits per byte, and the task that lost most."""
    heads = ("length", "", "skipped", "bits per byte, more than dense", "tasks together", "worst")
    lines = _begin(heads)
    own = sorted((cell for cell in cells if cell.group == group), key=lambda cell: cell.length)
    for length, of_length in groupby(own, key=lambda cell: cell.length):
        of_all = list(of_length)
        shares = [cell.sparsity for cell in of_all if cell.task == TEXT and cell.sparsity]
        for variant in dict.fromkeys(cell.variant for cell in of_all):
            of_variant = [cell for cell in of_all if cell.variant == variant]
            text = next((cell for cell in of_variant if cell.task == TEXT), None)
            tasks = [cell for cell in of_variant if cell.task != TEXT]
            worst = max(tasks, key=lambda cell: cell.drop, default=None)
            share = text.sparsity if text else None
            # Chosen tiles are as many as those of skip-softmax, which counts them.
            skipped = f"{share:.1%}" if share else "as many" if shares else ""
            lines.append(
                _line(
                    str(length),
                    variant,
                    skipped,
                    _more(text) if text else "",
                    _points(_together(tasks)) if tasks else "",
                    f"{worst.task} {_points(worst)}" if worst else "",
                )
            )
    return "\n".join(lines) + "\n"


def tasks_table(cells: Sequence[Cell]) -> str:
    """Exact answers to each task in per cent, dense and under each preset, with Wilson's intervals."""
    own = [cell for cell in cells if cell.group == PRESETS and cell.task != TEXT]
    variants = list(dict.fromkeys(cell.variant for cell in own))
    lines = _begin(("task", "length", "dense", *(f"`{name}`" for name in variants)))
    for task, length in dict.fromkeys((cell.task, cell.length) for cell in own):
        of_place = {
            cell.variant: cell for cell in own if (cell.task, cell.length) == (task, length)
        }
        first = next(iter(of_place.values()))
        shares = [_share(first.dense / first.samples, first.dense_interval)]
        for name in variants:
            cell = of_place[name]
            shares.append(_share(cell.sparse / cell.samples, cell.sparse_interval))
        lines.append(_line(task, str(length), *shares))
    return "\n".join(lines) + "\n"


def refreshed(text: str, where: dict[str, str], cells: Sequence[Cell]) -> str:
    """A page with its blocks written anew."""
    said = ", ".join(f"{name} {value}" for name, value in where.items() if value)

    def block(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        table = tasks_table(cells) if name == "tasks" else group_table(cells, name)
        return f"{begin}\n{said}\n\n{table}\n{end}"

    if not BLOCK.search(text):
        raise ValueError(
            "got a page without blocks; takes <!-- quality: GROUP --> ... <!-- /quality -->"
        )
    return BLOCK.sub(block, text)


def _together(cells: Sequence[Cell]) -> Cell:
    """All tasks as one."""
    first, *others = [
        Cell(
            cell.group, cell.variant, "all", cell.length, cell.samples,
            cell.dense, cell.sparse, cell.lost, cell.gained,
        )
        for cell in cells
    ]  # fmt: skip
    return sum(others, first)


def _more(cell: Cell) -> str:
    interval = cell.more_bits_interval
    ends = "" if interval is None else f" ({interval[0]:+.4f} to {interval[1]:+.4f})"
    return f"{cell.more_bits:+.4f}{ends}"


def _points(cell: Cell) -> str:
    low, high = cell.drop_interval
    return f"{-100 * cell.drop:+.1f} ({-100 * high:+.1f} to {-100 * low:+.1f})"


def _share(share: float, interval: Interval) -> str:
    return f"{100 * share:.1f} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def _begin(heads: Sequence[str]) -> list[str]:
    return [_line(*heads), "|" + "---|" * len(heads)]


def _line(*parts: str) -> str:
    return f"| {' | '.join(parts)} |"


def main(
    files: Annotated[list[Path], typer.Argument(help="What runs wrote, on one kind of machine.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="All in one file.")] = None,
    into: Annotated[
        Path | None, typer.Option(help="A page, whose blocks are written anew.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="A folder to draw into.")] = None,
) -> None:
    """Add up the cells of files, and show them."""
    loaded = [load(path) for path in files]
    where = loaded[0][0]
    cells = added(cell for _, found in loaded for cell in found)
    if json_file is not None:
        save(json_file, where, cells)
    if into is not None:
        into.write_text(refreshed(into.read_text(), where, cells))
    if plots is not None:
        from examples.quality.plots import save_plots

        save_plots(plots, cells)
    if json_file is None and into is None and plots is None:
        for cell in cells:
            typer.echo(summary(cell))


if __name__ == "__main__":
    typer.run(main)

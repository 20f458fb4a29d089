"""Bits per byte against tiles skipped, and each preset by length, of one file of cells.

python -m examples.quality.plots mine.json mine.png --length 4096 --presets presets.png
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.quality.cells import TEXT, Cell, load
from examples.quality.tables import PRESETS, Row, rows
from examples.quality.variants import LAMBDA
from modelopt_sparse.errors import ArgumentError, describe
from modelopt_sparse.faithfulness.intervals import Interval

# Below this many bits the axis is linear.
LINEAR_BITS = 1e-3
PRESET_MARKS = "os^Dvp"
MARKS = {"selectors": "s", "orders": "^", "tile": ".", "exact": "D"}
DEFAULTS = {"presets": "skip_softmax", "orders": "skip-softmax", "selectors": "skip-softmax"}
"""What skip-softmax as it is by default is called, in the groups that have it."""


def draw(axes: Axes, cells: Sequence[Cell], length: int) -> None:
    """Skip-softmax in prefill by lambda as a line, and what else leaves tiles out as points, with intervals.

    Raises:
        ArgumentError: the default wasn't measured on text of this length.
    """
    groups = {"settings", *DEFAULTS}
    of_text = [cell for cell in cells if cell.task == TEXT and cell.length == length]
    own = [cell for cell in of_text if cell.group in groups]
    defaults = {cell.group: cell for cell in own if cell.variant == DEFAULTS.get(cell.group)}
    if not defaults:
        got = ", ".join(f"{cell.group} {cell.variant}" for cell in of_text) or "none"
        takes = "some with skip-softmax by default, of presets, orders or selectors"
        raise ArgumentError(describe(f"cells of text at {length} tokens", got, takes))
    default = next(defaults[group] for group in DEFAULTS if group in defaults)
    settings = [cell for cell in own if cell.group == "settings"]
    by_lambda = [cell for cell in settings if cell.variant.startswith("lambda ")] + [default]
    by_lambda.sort(key=lambda cell: cell.sparsity or 0.0)
    axes.set_prop_cycle(color=colormaps["tab20"].colors)
    axes.errorbar(*_points(by_lambda, default), fmt="o-", capsize=2, label="skip-softmax by lambda")
    for cell in by_lambda:
        label = cell.variant.removeprefix("lambda ") if cell is not default else f"{LAMBDA:g}"
        axes.annotate(
            label, (cell.sparsity, cell.more_bits), xytext=(4, -12), textcoords="offset points"
        )
    for cell in own:
        kind = cell.variant.split()[0] if cell.group == "settings" else cell.group
        if kind in MARKS and cell not in defaults.values():
            # Chosen tiles are as many as those of skip-softmax, which counts them.
            points = _points([cell], defaults.get(cell.group, default))
            axes.errorbar(*points, fmt=MARKS[kind], capsize=2, label=cell.variant)
    axes.axhline(0.0, color="grey", linewidth=0.8)
    axes.set_yscale("symlog", linthresh=LINEAR_BITS)
    axes.set_ylim(bottom=-LINEAR_BITS)
    axes.set(xlabel="share of tiles skipped", ylabel="bits per byte, more than dense")
    windows = " or ".join(str(count) for count in sorted({cell.samples for cell in own}))
    axes.set_title(f"{length} tokens, {windows} windows, 95 % intervals")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _points(cells: Sequence[Cell], default: Cell) -> tuple[list[float], list[float], list]:
    """Shares, differences, and the lengths of the bars below and above them."""
    shares = [cell.sparsity or default.sparsity or 0.0 for cell in cells]
    bits = [cell.more_bits for cell in cells]
    return shares, bits, _bars(bits, [cell.more_bits_interval for cell in cells])


def _bars(values: Sequence[float], intervals: Sequence[Interval | None]) -> list[list[float]]:
    """How far the intervals reach below and above the values; None has no length."""
    ends = [each or (y, y) for y, each in zip(values, intervals, strict=True)]
    return [
        [y - low for y, (low, _) in zip(values, ends, strict=True)],
        [high - y for y, (_, high) in zip(values, ends, strict=True)],
    ]


Measured = tuple[float, Interval | None]


def _share(row: Row) -> Measured | None:
    share = row.text.sparsity if row.text else None
    return None if share is None else (share, None)


def _bits(row: Row) -> Measured | None:
    return (row.text.more_bits, row.text.more_bits_interval) if row.text else None


def _worst(row: Row) -> Measured | None:
    return (row.worst.points, row.worst.points_interval) if row.worst else None


PANELS: Mapping[str, Callable[[Row], Measured | None]] = {
    "share of tiles skipped, in text": _share,
    "bits per byte, more than dense": _bits,
    "worst task, points above dense": _worst,
}


def draw_presets(figure: Figure, cells: Sequence[Cell]) -> None:
    """Each preset by length: what its row of the table says, with intervals.

    Presets stand side by side, so that those that agree are all seen. One that skips no tiles has no share.

    Raises:
        ArgumentError: no preset was measured.
    """
    found = rows(cells, PRESETS)
    if not found:
        got = ", ".join(sorted({cell.group for cell in cells})) or "none"
        raise ArgumentError(describe("cells", got, "some of presets"))
    names = list(dict.fromkeys(row.variant for row in found))
    lengths = list(dict.fromkeys(row.length for row in found))
    panels = figure.subplots(1, len(PANELS))
    for axes, (label, measured) in zip(panels, PANELS.items(), strict=True):
        for index, name in enumerate(names):
            aside = 0.8 * ((index + 0.5) / len(names) - 0.5)
            own = {row.length: measured(row) for row in found if row.variant == name}
            drawn = {length: value for length, value in own.items() if value}
            places = [lengths.index(length) + aside for length in drawn]
            values = [value for value, _ in drawn.values()]
            bars = _bars(values, [interval for _, interval in drawn.values()])
            mark = PRESET_MARKS[index % len(PRESET_MARKS)]
            axes.errorbar(places, values, bars, fmt=mark, capsize=2, label=name)
        axes.axhline(0.0, color="grey", linewidth=0.8)
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set(xlabel="tokens", title=label)
    figure.suptitle("the presets, 95 % intervals")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def main(
    file: Annotated[Path, typer.Argument(help="Cells.")],
    picture: Annotated[Path, typer.Argument(help="Bits per byte against tiles skipped.")],
    length: Annotated[int, typer.Option(help="Tokens of a window, in that picture.")] = 4096,
    presets: Annotated[
        Path | None, typer.Option(help="A second picture: each preset by length.")
    ] = None,
) -> None:
    """Draw what leaving tiles out costs."""
    _, cells = load(file)
    figure = Figure(figsize=(9, 5), layout="constrained")
    of_presets = Figure(figsize=(11, 4.5), layout="constrained")
    try:
        draw(figure.subplots(), cells, length)
        if presets:
            draw_presets(of_presets, cells)
    except ArgumentError as error:
        raise typer.BadParameter(str(error)) from None
    figure.savefig(picture, dpi=120)
    if presets:
        of_presets.savefig(presets, dpi=120)


if __name__ == "__main__":
    typer.run(main)

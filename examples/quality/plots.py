"""Bits per byte against tiles skipped, of one file of cells.

python -m examples.quality.plots docs/quality/h200.json docs/quality/h200.png --length 4096
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.quality.cells import TEXT, Cell, load
from examples.quality.variants import LAMBDA
from modelopt_sparse.errors import ArgumentError, describe

# Below this many bits the axis is linear.
LINEAR_BITS = 1e-3
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
    ends = [cell.more_bits_interval or (cell.more_bits, cell.more_bits) for cell in cells]
    bars = [
        [y - low for y, (low, _) in zip(bits, ends, strict=True)],
        [high - y for y, (_, high) in zip(bits, ends, strict=True)],
    ]
    return shares, bits, bars


def main(
    file: Annotated[Path, typer.Argument(help="Cells.")],
    picture: Annotated[Path, typer.Argument(help="What to write.")],
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 4096,
) -> None:
    """Draw what leaving tiles out costs."""
    _, cells = load(file)
    figure = Figure(figsize=(9, 5), layout="constrained")
    try:
        draw(figure.subplots(), cells, length)
    except ArgumentError as error:
        raise typer.BadParameter(str(error)) from None
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    typer.run(main)

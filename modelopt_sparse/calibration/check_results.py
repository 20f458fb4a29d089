"""Target against achieved, as plain data and as a table."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from modelopt_sparse.errors import ArgumentTypeError, describe
from modelopt_sparse.methods.calibrated import PhaseName

HEADINGS = ("phase", "prompt tokens", "sequences", "target", "achieved", "off, points")
# Text of another kind, or chance in few tiles, moves the share further. And no lambda skips all tiles.
NEAR, ADVICE = (
    0.03,
    "More than 3 points off: calibrate on more text, of the kind that the model is for; where less is "
    "skipped in short prompts, more may not be possible",
)


class CheckRow(BaseModel):
    """Sequences of one length in one phase.

    Args:
        length: tokens of the prompt; in decode too, where tokens after it are counted.
        sequences: how many.
        target: the share of visible tiles that is to be skipped, over all modules that are calibrated.
        achieved: the share that was.
        bound: what skipping may cost, an error or a dropped mass; None where nothing bounds it.
        cost: what it does, measured as the bound is meant: over the modules, or of the one that it costs most
            where each has thresholds of its own.
    """

    model_config = ConfigDict(frozen=True)

    phase: PhaseName
    length: int
    sequences: int
    target: float
    achieved: float
    bound: float | None = None
    cost: float | None = None


class CalibrationCheck(BaseModel):
    """How near a calibrated model comes to what it is asked for: what `check_calibration` returns.

    Args:
        rows: by phase and length, rising.
        bounded: what the rows' bounds and costs are of, in words; None where nothing is bounded.
    """

    model_config = ConfigDict(frozen=True)

    rows: tuple[CheckRow, ...]
    bounded: str | None = None

    def headings(self) -> tuple[str, ...]:
        """Of a table; with a bound, of that and of the cost too."""
        limits = () if self.bounded is None else (f"{self.bounded}: at most", "is")
        return (*HEADINGS, *limits)

    def cells(self) -> list[tuple[str, ...]]:
        """By row, as under the headings."""
        width = len(self.headings())
        return [_cells(row)[:width] for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """The same as dicts, lists and numbers, as JSON takes them."""
        return self.model_dump(mode="json")

    def print(self, console: Console | None = None) -> None:
        """Prints a table, a line a row.

        Args:
            console: where to; standard output by default.

        Raises:
            ArgumentTypeError: not a console.
        """
        if not isinstance(console, Console | None):
            raise ArgumentTypeError(describe("console", repr(console), "a rich.console.Console"))
        (console or Console()).print(self._table())

    def _table(self) -> Table:
        far = any(abs(row.achieved - row.target) > NEAR for row in self.rows)
        table = Table(
            title="Tiles skipped: target against achieved", caption=ADVICE if far else None
        )
        for name in self.headings():
            table.add_column(name, justify="left" if name == HEADINGS[0] else "right")
        for cells in self.cells():
            table.add_row(*cells)
        return table


def _cells(row: CheckRow) -> tuple[str, ...]:
    return (
        row.phase,
        f"{row.length:,}",
        f"{row.sequences}",
        f"{row.target:.1%}",
        f"{row.achieved:.1%}",
        f"{100 * (row.achieved - row.target):+.1f}",
        *("-" if x is None else f"{x:.3g}" for x in (row.bound, row.cost)),
    )

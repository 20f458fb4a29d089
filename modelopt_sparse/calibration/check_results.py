"""Target against achieved, as plain data and as a table."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from modelopt_sparse.errors import ArgumentTypeError, describe
from modelopt_sparse.methods.calibrated import PhaseName

HEADINGS = ("phase", "prompt tokens", "sequences", "target", "achieved", "off, points")


class CheckRow(BaseModel):
    """Sequences of one length in one phase.

    Args:
        length: tokens of the prompt; in decode too, where tokens after it are counted.
        sequences: how many.
        target: the share of visible tiles that is to be skipped, over all modules that are calibrated.
        achieved: the share that was.
    """

    model_config = ConfigDict(frozen=True)

    phase: PhaseName
    length: int
    sequences: int
    target: float
    achieved: float

    def cells(self) -> tuple[str, ...]:
        """As under `HEADINGS`."""
        return (
            self.phase,
            f"{self.length:,}",
            f"{self.sequences}",
            f"{self.target:.1%}",
            f"{self.achieved:.1%}",
            f"{100 * (self.achieved - self.target):+.1f}",
        )


class CalibrationCheck(BaseModel):
    """How near a calibrated model comes to what it is asked for: what `check_calibration` returns.

    Args:
        rows: by phase and length, rising.
    """

    model_config = ConfigDict(frozen=True)

    rows: tuple[CheckRow, ...]

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
        table = Table(title="Tiles skipped: target against achieved")
        for name in HEADINGS:
            table.add_column(name, justify="left" if name == HEADINGS[0] else "right")
        for row in self.rows:
            table.add_row(*row.cells())
        return table

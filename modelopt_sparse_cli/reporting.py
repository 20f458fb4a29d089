"""What a command says: tables for people, one document for programs, progress on standard error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

TABLE_WIDTH = 150
"""Where no terminal says how wide it is."""


@dataclass
class Report:
    """What a command finds.

    Args:
        console: for tables and lines.
        document: the same as plain data.
    """

    console: Console
    document: dict[str, Any] = field(default_factory=dict)


@contextmanager
def reporting(as_json: bool) -> Iterator[Report]:
    """A report; at the end of the block its document is printed, if that is what is wanted.

    Until then standard output is closed to everybody else: what models and libraries print there goes to
    standard error. If the block fails, no document is printed.
    """
    report = Report(_console(as_json))
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield report
    if as_json:
        print(json.dumps(_finite(report.document), indent=2, allow_nan=False))


def progress() -> Progress:
    """A bar on standard error, with the time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A spinner on standard error, for what can't tell how far it is."""
    with Console(stderr=True).status(text):
        yield


def _finite(value: Any) -> Any:
    """The same; JSON has no infinity and no NaN, so they are None."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _console(is_stderr: bool) -> Console:
    console = Console(stderr=is_stderr, markup=False)
    if console.is_terminal:
        return console
    return Console(stderr=is_stderr, markup=False, width=TABLE_WIDTH)

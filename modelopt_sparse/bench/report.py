"""Rows as a table and as JSON, with what they were measured on."""

from __future__ import annotations

import csv
import json
import math
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from modelopt_sparse.files import written_whole
from modelopt_sparse.version import __version__

from .break_even import Advice, BreakEven
from .run import Row, fastest_rivals
from .timing import Times


def environment(device: torch.device) -> dict[str, Any]:
    """The device and the versions that a timing depends on."""
    try:
        triton = import_module("triton").__version__
    except ImportError:
        triton = None
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "modelopt_sparse": __version__,
        "torch": torch.__version__,
        "triton": triton,
        "cudnn": _cudnn_version() if on_gpu else None,
        "python": platform.python_version(),
        "clocks": _clocks(device) if on_gpu else None,
        "commit": _commit(),
    }


def _clocks(device: torch.device) -> str:
    """Clocks that it may reach, and what it may draw: `nvidia-smi`, if that is there."""
    # Not by its number: nvidia-smi counts GPUs that are hidden from this process too.
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--format=csv,noheader"]
    return _said([*command, "--query-gpu=clocks.max.sm,clocks.max.mem,power.limit"])


def _commit() -> str:
    """Of the checkout that this package lies in, with a mark where files were changed."""
    folder = str(Path(__file__).parent)
    return _said(["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"])


def _said(command: list[str]) -> str:
    """The first line of what a program prints; empty where there is no such program, or it fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout.strip().partition("\n")[0]


def _cudnn_version() -> int | None:
    # It ships no types.
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return version


def progress() -> Progress:
    """A bar on standard error, if that is a terminal, with the time that is left.

    It is drawn when it moves, never by a thread: that would run while something is timed.
    """
    console = Console(stderr=True)
    return Progress(
        console=console,
        auto_refresh=False,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=math.inf,  # a case may take minutes
    )


def table_of(group: str, rows: Sequence[Row]) -> Table:
    """The rows of a group; a star marks the fastest of others' kernels in each case."""
    fastest = fastest_rivals(rows).values()
    table = Table(title=group, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("case")
    table.add_column("beside")
    for heading in ("ratio", "ours ms (p20-p80)", "theirs ms (p20-p80)", "TFLOP/s", "skipped"):
        table.add_column(heading, justify="right")
    table.add_column("error", justify="right")
    table.add_column("note")
    for row in rows:
        table.add_row(
            row.case,
            f"{row.peer} *" if any(row is each for each in fastest) else row.peer,
            _number(row.ratio, ".2f", "x"),
            _times(row.ours),
            _times(row.theirs),
            _number(row.teraflops, ".0f"),
            _number(row.sparsity, ".1%"),
            _number(row.error, ".4f"),
            row.note,
            style="red" if row.failed else None,
        )
    return table


def break_even_table(found: Sequence[BreakEven]) -> Table:
    """What `break_evens` found."""
    table = Table(title="break-even", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("case")
    table.add_column("fastest dense")
    headings = "own dense / fastest", "skipped tile / tile", "break-even sparsity"
    for heading in headings:
        table.add_column(heading, justify="right")
    for each in found:
        needed = f"{each.sparsity:.0%}" if each.sparsity <= 1 else "none"
        numbers = f"{each.dense_share:.2f}", f"{each.tile_cost:.2f}", needed
        table.add_row(each.case, each.rival, *numbers)
    return table


def said_of(advised: Advice) -> str:
    """The advice, in words."""
    if advised.min_context is None:
        return "At no length here does skipping half of the tiles pay."
    return (
        f"Skipping pays from {advised.min_context} tokens on (min_context), where at least "
        f"{advised.min_sparsity:.0%} of tiles are skipped (min_sparsity)."
    )


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _times(times: Times | None) -> str:
    return "" if times is None else f"{times.median:.3f} ({times.p20:.3f}-{times.p80:.3f})"


def save_csv(path: Path, rows: Sequence[Row]) -> None:
    """Writes a line a row, the file whole or not at all; times in milliseconds."""
    times = ("median", "p20", "p80", "calls")
    with written_whole(path) as new, new.open("w", newline="") as file:
        writer = csv.writer(file)
        plain = [name for name in Row.__dataclass_fields__ if name not in ("ours", "theirs")]
        writer.writerow(
            plain + [f"{whose}_{name}" for whose in ("ours", "theirs") for name in times]
        )
        for row in rows:
            values = [getattr(row, name) for name in plain]
            for taken in (row.ours, row.theirs):
                values += [None if taken is None else getattr(taken, name) for name in times]
            writer.writerow(values)


def save(path: Path, where: dict[str, Any], rows: Sequence[Row]) -> None:
    """Writes ``{"environment": ..., "rows": [...]}``, whole or not at all; times in milliseconds."""
    data = {"environment": where, "rows": [asdict(row) for row in rows]}
    with written_whole(path) as new:
        new.write_text(json.dumps(data, indent=1) + "\n")


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """What `save` wrote.

    Raises:
        OSError, ValueError, TypeError, KeyError: the file isn't there, or is none of `save`'s.
    """
    data = json.loads(path.read_text())

    def times(values: dict[str, Any] | None) -> Times | None:
        return None if values is None else Times(**values)

    rows = [
        Row(**{**row, "ours": times(row["ours"]), "theirs": times(row["theirs"])})
        for row in data["rows"]
    ]
    return data["environment"], rows

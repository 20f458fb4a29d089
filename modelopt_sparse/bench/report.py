"""Rows as a table and as JSON, with what they were measured on."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from modelopt_sparse.version import __version__

from .run import Row
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
    }


def _cudnn_version() -> int | None:
    # It ships no types.
    version: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return version


def table_of(group: str, rows: Sequence[Row]) -> Table:
    """The rows of a group."""
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
            row.peer,
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


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _times(times: Times | None) -> str:
    return "" if times is None else f"{times.median:.3f} ({times.p20:.3f}-{times.p80:.3f})"


def save(path: Path, where: dict[str, Any], rows: Sequence[Row]) -> None:
    """Writes ``{"environment": ..., "rows": [...]}``; times in milliseconds."""
    data = {"environment": where, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(data, indent=1) + "\n")

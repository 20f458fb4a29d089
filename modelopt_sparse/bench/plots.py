"""Plots of rows: speed-up against sparsity, and how near to the roofline. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from .baselines import COPY, PRODUCT
from .break_even import break_evens
from .run import Row, fastest_rivals


def save_plots(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Writes ``speedup.png`` and ``roofline.png``, as far as there are rows for them.

    Raises:
        ImportError: matplotlib isn't installed.
    """
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in (("speedup", _draw_speedup), ("roofline", _draw_roofline)):
        figure = Figure(figsize=(8, 5), layout="constrained")
        if draw(figure.subplots(), rows):
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=150)
            written.append(path)
    return written


def roofline_shares(rows: Sequence[Row]) -> dict[str, float]:
    """Of each case that stands beside a bound, the share of the one that binds."""
    shares: dict[str, float] = {}
    for row in rows:
        if row.peer in (COPY, PRODUCT) and row.ratio is not None and not row.sparsity:
            shares[row.case] = max(row.ratio, shares.get(row.case, 0.0))
    return shares


def _draw_speedup(axes: Any, rows: Sequence[Row]) -> bool:
    """Each group's cases that skip, the most that saving the second product gives, and break-even points."""
    skipping = [row for row in fastest_rivals(rows).values() if row.sparsity]
    if not skipping:
        return False
    limit = [i / 50 for i in range(50)]
    axes.plot(limit, [2 / (2 - s) for s in limit], color="grey", label="2 / (2 - s)")
    axes.axhline(1.0, color="grey", linestyle=":")
    for group, members in groupby(sorted(skipping, key=lambda r: r.group), key=lambda r: r.group):
        of_group = sorted(members, key=lambda r: r.sparsity or 0.0)
        axes.plot([r.sparsity for r in of_group], [r.ratio for r in of_group], "o", label=group)
    needed = [each.sparsity for each in break_evens(rows) if 0 < each.sparsity <= 1]
    axes.plot(needed, [1.0] * len(needed), "x", color="black", label="break-even")
    axes.set(xlabel="share of tiles skipped", ylabel="speed-up over the fastest dense kernel")
    axes.legend()
    return True


def _draw_roofline(axes: Any, rows: Sequence[Row]) -> bool:
    shares = roofline_shares(rows)
    if not shares:
        return False
    axes.barh(list(shares), list(shares.values()))
    axes.axvline(1.0, color="grey", linestyle=":")
    axes.invert_yaxis()
    axes.set(xlabel=f"share of the binding bound: a {COPY}, or a {PRODUCT}")
    return True

"""Tiles skipped per layer and head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    import numpy as np


def skipped_by_head(
    stats: dict[str, dict[str, Any]], phase: str = "prefill"
) -> np.ndarray[Any, Any] | None:
    """Share of visible tiles that was skipped: [layers, heads], from `modelopt_sparse.get_stats`.

    NaN where a layer has fewer heads than another. None where nothing was counted: the method does not skip
    tiles in that phase.
    """
    import numpy as np

    rows = [
        np.divide(entry[phase]["skipped"], entry[phase]["visible"])
        for entry in stats.values()
        if entry[phase] is not None
    ]
    if not rows:
        return None
    shares = np.full((len(rows), max(map(len, rows))), np.nan)
    for share, row in zip(shares, rows, strict=True):
        share[: len(row)] = row
    return shares


def table_of(shares: np.ndarray[Any, Any]) -> Table:
    """One row a layer, one column a head, in percent; blank where there is none."""
    table = Table(title="Tiles skipped, % (layers down, heads across)")
    table.add_column("layer", justify="right")
    for head in range(shares.shape[1]):
        table.add_column(f"{head}", justify="right")
    for layer, row in enumerate(shares):
        table.add_row(
            f"{layer}", *("" if math.isnan(share) else f"{100 * share:.0f}" for share in row)
        )
    return table

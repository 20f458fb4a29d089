"""What a calibration found: formulas, and what runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from torch import nn


def fitted_thresholds(model: nn.Module) -> list[dict[str, Any]]:
    """The calibrated thresholds of a model, those with the same formula together.

    Returns:
        ``phase``; ``modules``, their names; ``target``; ``formula``: ``a``, ``b`` and ``worst_error`` in
        points, or None; ``lengths`` that the table has, or None where the formula runs; ``by_head``.
    """
    from modelopt_sparse.calibration.calibrated import calibrated_phases

    found: dict[Any, dict[str, Any]] = {}
    for phase, name, _, threshold in calibrated_phases(model):
        formula, table = threshold.formula, threshold.table
        same = (
            phase,
            formula,
            threshold.target_sparsity,
            None if table is None else table.lengths,
        )
        row = {
            "phase": phase,
            "modules": [],
            "target": threshold.target_sparsity,
            "formula": None if formula is None else formula.model_dump(mode="json"),
            "lengths": None if table is None else list(table.lengths),
            "by_head": table is not None and isinstance(table.factors[0][0], tuple),
        }
        found.setdefault(same, row)["modules"].append(name)
    return list(found.values())


def table_of(rows: list[dict[str, Any]]) -> Table:
    """A line a row."""
    table = Table(
        title="Calibrated thresholds",
        caption="lambda = a * exp(b * target) / keys, as engines read it. "
        "Off: the most by which it misses a share, where it was fitted",
    )
    table.add_column("phase")
    table.add_column("modules", overflow="fold")
    for name in ("target", "a", "b", "off, points"):
        table.add_column(name, justify="right")
    table.add_column("runs")
    for row in rows:
        names = row["modules"]
        formula = row["formula"]
        numbers = ("-", "-", "-")
        if formula is not None:
            off = formula["worst_error"]
            numbers = (
                f"{formula['a']:.4g}",
                f"{formula['b']:.4g}",
                "-" if off is None else f"{off:.1f}",
            )
        said = names[0] if len(names) == 1 else f"{len(names)} modules"
        table.add_row(row["phase"], said, f"{row['target']:.1%}", *numbers, _runs(row))
    return table


def _runs(row: dict[str, Any]) -> str:
    if row["lengths"] is None:
        return "the formula"
    of_heads = ", by head" * row["by_head"]
    first, *others = row["lengths"]
    keys = f"{first:,} to {others[-1]:,}" if others else f"{first:,}"
    return f"a table, {keys} keys{of_heads}"

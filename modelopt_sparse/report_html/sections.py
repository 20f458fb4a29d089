"""The parts of the page that are tables and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element

from torch import nn

from modelopt_sparse.calibration.calibrated import calibrated_phases
from modelopt_sparse.calibration.check_results import CalibrationCheck
from modelopt_sparse.faithfulness.results import Comparison
from modelopt_sparse.faithfulness.table import token_caption, token_headings, token_rows
from modelopt_sparse.methods.calibrated import CalibratedThreshold, PhaseName

from .curves import curves
from .elements import el, table

if TYPE_CHECKING:
    from modelopt_sparse.bench.run import Row

# Where a formula runs and nothing was checked, there are no lengths of its own.
LENGTHS = (1024, 8192, 65536)


def quality(found: Comparison) -> list[Element]:
    """What the tokens say, and over what the intervals are."""
    return [
        table(token_headings(found), token_rows(found)),
        el("p", f"{token_caption(found)}.", class_="note"),
    ]


def calibration(model: nn.Module, check: CalibrationCheck | None) -> list[Element]:
    """Target against achieved, and the curves of each threshold; nothing if none was calibrated."""
    users: dict[tuple[PhaseName, CalibratedThreshold], list[str]] = {}
    for phase, name, _, threshold in calibrated_phases(model):
        users.setdefault((phase, threshold), []).append(name)
    if not users:
        return []
    found = [el("h2", "Calibration")]
    rows = () if check is None else check.rows
    if check is not None and rows:
        found.append(table(check.headings(), check.cells()))
    for (phase, threshold), names in users.items():
        of_phase = [row for row in rows if row.phase == phase]
        own = () if threshold.table is None else threshold.table.lengths
        lengths = sorted({*own, *(row.length for row in of_phase)}) or LENGTHS
        whose = names[0] if len(names) == 1 else f"{len(names)} modules"
        title = f"Lambda by share of tiles in {phase}: {whose}"
        found.append(curves(title, threshold, lengths, of_phase, _formula(threshold)))
    return found


def _formula(threshold: CalibratedThreshold) -> str:
    if threshold.formula is None:
        return ""
    a, b = threshold.formula.a, threshold.formula.b
    return f"Formula for engines: lambda = {a:.4g} * exp({b:.4g} * share) / keys."


def speed(where: Mapping[str, Any], rows: Sequence[Row]) -> list[Element]:
    """Times of the benchmark; above 1 our kernels are faster."""
    said = ", ".join(f"{name} {value}" for name, value in where.items() if value)
    return [
        el("h2", "Speed"),
        el(
            "p",
            "Of the kernels, measured by the benchmark. Ratio: the time of what stands beside over ours;"
            " above 1, ours are faster. Skipped: of visible tiles. Error: relative, of our result.",
        ),
        el("p", f"Measured with {said}.", class_="note"),
        table(
            ("case", "group", "beside", "ratio", "skipped", "error", "note"),
            [
                (
                    row.case,
                    row.group,
                    row.peer,
                    "" if row.ratio is None else f"{row.ratio:.2f}",
                    "" if row.sparsity is None else f"{row.sparsity:.1%}",
                    "" if row.error is None else f"{row.error:.4f}",
                    row.note,
                )
                for row in rows
            ],
            words=("group", "beside", "note"),
        ),
    ]

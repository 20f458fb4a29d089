"""The parts of the page that are tables and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element

from torch import nn

from modelopt_sparse.calibration.check_results import HEADINGS, CalibrationCheck
from modelopt_sparse.faithfulness.results import Comparison
from modelopt_sparse.faithfulness.table import token_headings, token_rows
from modelopt_sparse.methods.calibrated import (
    PHASES,
    CalibratedThreshold,
    PhaseName,
    SkipSoftmaxConfig,
)
from modelopt_sparse.module_state import sparse_modules

from .curves import curves
from .elements import el, table

if TYPE_CHECKING:
    from modelopt_sparse.bench.run import Row

# Where a formula runs and nothing was checked, there are no lengths of its own.
LENGTHS = (1024, 8192, 65536)


def quality(found: Comparison) -> Element:
    """What the tokens say."""

    return table(token_headings(found), token_rows(found))


def calibration(model: nn.Module, check: CalibrationCheck | None) -> list[Element]:
    """Target against achieved, and the curves of each threshold; nothing if none was calibrated."""
    users: dict[tuple[PhaseName, CalibratedThreshold], list[str]] = {}
    for name, module in sparse_modules(model):
        config = module.method.config
        for phase in PHASES if isinstance(config, SkipSoftmaxConfig) else ():
            threshold = config.threshold(phase)
            if isinstance(threshold, CalibratedThreshold):
                users.setdefault((phase, threshold), []).append(name)
    if not users:
        return []
    found = [el("h2", "Calibration")]
    rows = () if check is None else check.rows
    if rows:
        found.append(table(HEADINGS, [row.cells() for row in rows]))
    for (phase, threshold), names in users.items():
        of_phase = [row for row in rows if row.phase == phase]
        own = () if threshold.table is None else threshold.table.lengths
        lengths = sorted({*own, *(row.length for row in of_phase)}) or LENGTHS
        whose = names[0] if len(names) == 1 else f"{len(names)} modules"
        title = (
            f"{whose} in {phase}: lambda by share. Rings: targets; discs: achieved by all modules."
        )
        if threshold.formula is not None:
            a, b = threshold.formula.a, threshold.formula.b
            title += f" Formula for engines: {a:.4g} * exp({b:.4g} * target) / keys."
        found.append(curves(title, threshold, lengths, of_phase))
    return found


def speed(where: Mapping[str, Any], rows: Sequence[Row]) -> list[Element]:
    """Times of the benchmark; above 1 our kernels are faster."""
    said = ", ".join(f"{name} {value}" for name, value in where.items() if value)
    return [
        el("h2", "Speed"),
        el("p", f"Of the kernels, measured by the benchmark: {said}. Above 1, ours are faster."),
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
        ),
    ]

"""From curves of some lengths to thresholds for all: a table of what was measured, and a formula."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import linear_regression

from modelopt_sparse.errors import ConfigError, describe
from modelopt_sparse.methods.calibrated import ScaleFormula, ScaleTable

from .curve import Curve

TARGETS = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""The shares of tiles that every table has: 5 % to 95 %."""


def targets_with(share: float) -> tuple[float, ...]:
    """The shares of a table: `TARGETS`, and the one that is asked for, which so isn't interpolated."""
    return tuple(sorted({*TARGETS, share} - {0.0}))


def table_of(curves: Mapping[int, Curve], targets: tuple[float, ...]) -> ScaleTable:
    """What each share takes at each length."""
    rows = (
        tuple(factor(curve, target, length) for target in targets)
        for length, curve in curves.items()
    )
    return ScaleTable(lengths=tuple(curves), targets=targets, factors=tuple(rows))


def factor(curve: Curve, share: float, length: int) -> float:
    """The scale factor by which sequences of so many keys skip this share."""
    # No share of 0 has a lambda, and the least is that of the last bin.
    return float(f"{max(curve.threshold(share), 2.0**-32) * length:.6g}")


def formula_of(curves: Mapping[int, Curve]) -> ScaleFormula:
    """``a * exp(b * share)``, by least squares over log(scale factor) where lambda lies between 0 and 1.

    Raises:
        ConfigError: no two shares of a table are reached by a lambda below 1.
    """
    points = [
        (target, math.log(threshold * length))
        for length, curve in curves.items()
        for target in TARGETS
        if 0 < (threshold := curve.threshold(target)) < 1
    ]
    if len({target for target, _ in points}) < 2:
        got = f"at most {100 * max(curve.most for curve in curves.values()):.1f} % of tiles skipped"
        remedy = "Calibrate on longer prompts."
        raise ConfigError(describe("calibration", got, "prompts that let 10 % be skipped", remedy))
    b, log_a = linear_regression(*zip(*points, strict=True))
    fitted = ScaleFormula(a=float(f"{math.exp(log_a):.6g}"), b=float(f"{b:.6g}"))
    errors = [
        abs(curve.share(min(fitted.factor(target) / length, 1.0)) - target)
        for length, curve in curves.items()
        for target in TARGETS
        if target <= curve.most
    ]
    return fitted.model_copy(update={"worst_error": round(100 * max(errors), 2)})

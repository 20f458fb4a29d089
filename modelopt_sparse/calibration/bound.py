"""The share of tiles that may be skipped while what it costs stays within a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from modelopt_sparse.config.calibration import BoundName
from modelopt_sparse.faithfulness.results import PhaseComparison
from modelopt_sparse.kernels.types import Phase

from .budget import PROBES
from .curve import Curve
from .fit import TARGETS
from .recorder import Tallies, Tally, by_length


@dataclass(frozen=True)
class Cost:
    """What skipping costs, as a number.

    Args:
        name: in words.
        at_probe: that of a module, from its tally, at a probe.
        found: the same where it was compared.
        together: one number of those of several modules.
        is_mass: it is of the mass that kernels sum, and the least probe within the bound counts, so that it
            isn't exceeded on what was counted. If not, it is interpolated between two probes.
    """

    name: str
    at_probe: Callable[[Tally, int], float]
    found: Callable[[PhaseComparison], float]
    together: Callable[[Sequence[float]], float]
    is_mass: bool = True


def _error(tally: Tally, probe: int) -> float:
    return math.sqrt(tally.errors[1 + probe].sum() / tally.squared_output)


def _mean_mass(tally: Tally, probe: int) -> float:
    return float(tally.masses[1 + probe].sum() / tally.masses[0].sum())


def _max_mass(tally: Tally, probe: int) -> float:
    return float(tally.largest[probe].max())


def _found_mean(found: PhaseComparison) -> float:
    return 0.0 if found.dropped_mass is None else found.dropped_mass.mean.overall


def _found_max(found: PhaseComparison) -> float:
    return 0.0 if found.dropped_mass is None else found.dropped_mass.max.overall


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(x * x for x in values) / len(values))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


COSTS: dict[BoundName, Cost] = {
    "target_error": Cost(
        "output error",
        _error,
        lambda found: found.relative_error.overall,
        _root_mean_square,
        is_mass=False,
    ),
    "target_dropped_mass": Cost("mean dropped mass", _mean_mass, _found_mean, _mean),
    "target_max_dropped_mass": Cost("max dropped mass", _max_mass, _found_max, max),
}
"""By the field of `CalibrationConfig` that bounds it. They are those of `modelopt_sparse.compare`."""


def share_within(modules: Sequence[Tallies], phase: Phase, cost: Cost, bound: float) -> float:
    """The largest share that modules may skip by one lambda at each length.

    Args:
        modules: what was counted of each, with what the probes cost.
        bound: what they cost together stays within it at each length, of those that have sequences of it.
    Returns:
        The share: at most the largest of `TARGETS`, or what lambda 1 skips where that is within the bound; 0
        where even the least probe costs more.
    """
    found = [by_length(own, phase) for own in modules]
    lengths = set().union(*found)
    tallies = [[own[length] for own in found if length in own] for length in lengths]
    curves = [Curve.of([tally.histogram for tally in own]) for own in tallies]
    limits = [_limit(own, curve, cost, bound) for own, curve in zip(tallies, curves, strict=True)]
    most = max((curve.most for curve in curves), default=0.0)
    return min([limit for limit in limits if limit is not None], default=min(most, TARGETS[-1]))


def _limit(tallies: Sequence[Tally], curve: Curve, cost: Cost, bound: float) -> float | None:
    """The share where the cost reaches the bound, at most the largest of `TARGETS`; None if it never does."""
    costs = [
        cost.together([cost.at_probe(own, probe) for own in tallies])
        for probe in range(len(PROBES))
    ]
    inside = next((i for i, found in enumerate(costs) if found <= bound), None)
    if inside is None:
        return 0.0
    if inside == 0:
        return None  # not even lambda 1 costs more
    threshold = PROBES[inside]
    if not cost.is_mass:
        # The logarithm of the cost is taken as linear in that of lambda.
        logs = [math.log(max(costs[i], 1e-15)) for i in (inside, inside - 1)]
        lambdas = [math.log(PROBES[i]) for i in (inside, inside - 1)]
        threshold = math.exp(np.interp(math.log(bound), logs, lambdas))
    return min(curve.share(threshold), TARGETS[-1])

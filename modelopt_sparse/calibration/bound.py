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
        between_probes: it is interpolated between two probes, and so kept to about. If not, the probe within
            the bound counts, and it isn't exceeded on what was counted.
    """

    name: str
    at_probe: Callable[[Tally, int], float]
    found: Callable[[PhaseComparison], float]
    together: Callable[[Sequence[float]], float]
    between_probes: bool = False


def _error(tally: Tally, probe: int) -> float:
    return math.sqrt(tally.errors[1 + probe].sum() / tally.errors[0].sum())


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
        between_probes=True,
    ),
    "target_dropped_mass": Cost("mean dropped mass", _mean_mass, _found_mean, _mean),
    "target_max_dropped_mass": Cost("max dropped mass", _max_mass, _found_max, max),
}
"""By the field of `CalibrationConfig` that bounds it. They are those of `modelopt_sparse.compare`."""


def share_within(modules: Sequence[Tallies], phase: Phase, cost: Cost, bound: float) -> float:
    """The largest share that modules may skip by one lambda at each length.

    Args:
        modules: what was counted of each, with what the probes cost.
        bound: the cost of all of them stays within it at each length.
    Returns:
        The share: at most the largest of `TARGETS`, 0 where even the least probe costs more.
    """
    lengths = [by_length(own, phase) for own in modules]
    common = set.intersection(*map(set, lengths)) if lengths else set()
    shares = [_share_at([own[length] for own in lengths], cost, bound) for length in common]
    return min(shares, default=TARGETS[-1])


def _share_at(tallies: Sequence[Tally], cost: Cost, bound: float) -> float:
    costs = [
        cost.together([cost.at_probe(own, probe) for own in tallies])
        for probe in range(len(PROBES))
    ]
    curve = Curve.of([own.histogram for own in tallies])
    if costs[0] <= bound:
        return TARGETS[-1]  # not even lambda 1 costs more
    inside = next((i for i, found in enumerate(costs) if found <= bound), None)
    if inside is None:
        return 0.0
    threshold = PROBES[inside]
    if cost.between_probes:
        # The logarithm of the cost is taken as linear in that of lambda.
        logs = [math.log(max(costs[i], 1e-15)) for i in (inside, inside - 1)]
        lambdas = [math.log(PROBES[i]) for i in (inside, inside - 1)]
        threshold = math.exp(np.interp(math.log(bound), logs, lambdas))
    return min(curve.share(threshold), TARGETS[-1])

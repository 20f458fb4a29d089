"""From what was counted to thresholds: one for all modules, one for each, or one for each head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from modelopt_sparse.config.calibration import CalibrationConfig
from modelopt_sparse.errors import ConfigError, describe
from modelopt_sparse.kernels.types import Phase
from modelopt_sparse.methods.calibrated import CalibratedThreshold, PhaseName, ScaleTable

from .bound import COSTS, share_within
from .budget import PROBES, HeadCost, shares
from .curve import Curve
from .fit import factor, formula_of, table_of, targets_with
from .recorder import Recorder, Tallies, Tally, added, by_length


def thresholds(
    recorders: Mapping[str, Recorder],
    tallies: Mapping[str, Tallies],
    phase: PhaseName,
    config: CalibrationConfig,
) -> dict[str, CalibratedThreshold]:
    """By module, its threshold in a phase.

    Args:
        recorders: of this process, looked at where heads are calibrated apart.
        tallies: what all processes counted.

    Raises:
        ConfigError: there were no tokens in that phase, or they let too little be skipped.
    """
    own = Phase(phase)

    def share(modules: Iterable[Tallies]) -> float:
        if config.bound is None:
            return config.shares[phase]
        name, bounds = config.bound
        return share_within(list(modules), own, COSTS[name], bounds[phase])

    if config.thresholds_for == "head":
        found = share(tallies.values())
        tables = _tables_by_head(recorders, own, targets_with(found))
        return {
            name: CalibratedThreshold(target_sparsity=found, table=table)
            for name, table in tables.items()
        }
    if config.thresholds_for == "layer":
        return {
            name: _threshold(each, own, share([each]), config) for name, each in tallies.items()
        }
    together = added(tallies.values())
    return dict.fromkeys(tallies, _threshold(together, own, share(tallies.values()), config))


def _threshold(
    tallies: Tallies, phase: Phase, share: float, config: CalibrationConfig
) -> CalibratedThreshold:
    counted = _counted(tallies, phase)
    curves = {length: Curve.of([tally.histogram]) for length, tally in counted.items()}
    table = table_of(curves, targets_with(share)) if config.form == "table" else None
    return CalibratedThreshold(target_sparsity=share, formula=formula_of(curves), table=table)


def _counted(tallies: Tallies, phase: Phase) -> dict[int, Tally]:
    found = by_length(tallies, phase)
    if not found:
        got = f"no tokens in {phase.value}"
        remedy = "Calibrate with prompts and, for decode, let the model write after them."
        raise ConfigError(describe("calibration", got, "some", remedy))
    return found


def _tables_by_head(
    recorders: Mapping[str, Recorder], phase: Phase, targets: tuple[float, ...]
) -> dict[str, ScaleTable]:
    """By module, scale factors of each head, such that the modules with sequences of a length together skip
    each of these shares.

    Raises:
        ConfigError: there were no tokens in that phase.
    """
    counted = {name: _counted(own.tallies, phase) for name, own in recorders.items()}
    rows: dict[str, dict[int, tuple[tuple[float, ...], ...]]] = {name: {} for name in counted}
    for length in sorted(set().union(*counted.values())):
        at_length = {name: own[length] for name, own in counted.items() if length in own}
        curves = {
            name: [Curve.of([column[:, None]]) for column in tally.histogram.T]
            for name, tally in at_length.items()
        }
        costs = [cost for name, tally in at_length.items() for cost in _costs(tally, curves[name])]
        by_target = [shares(costs, target) for target in targets]
        first = 0
        for name, own in curves.items():
            voters = recorders[name].heads // len(own)
            rows[name][length] = tuple(
                tuple(
                    factor(curve, share, length)
                    for curve, share in zip(own, found[first:], strict=False)
                    for _ in range(voters)
                )
                for found in by_target
            )
            first += len(own)
    return {
        name: ScaleTable(lengths=tuple(own), targets=targets, factors=tuple(own.values()))
        for name, own in rows.items()
    }


def _costs(tally: Tally, curves: Sequence[Curve]) -> list[HeadCost]:
    """What skipping costs each head of a module, against the output of all of them."""
    whole = tally.squared_output
    return [
        HeadCost(
            tiles=float(tiles),
            skipped=tuple(curve.share(probe) * float(tiles) for probe in PROBES),
            errors=tuple(float(error) / whole for error in errors),
        )
        for curve, tiles, errors in zip(
            curves, tally.histogram.sum(0), tally.errors[1:].T, strict=True
        )
    ]

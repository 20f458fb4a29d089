"""Whether a calibrated model skips what it is asked to: target against achieved, by phase and length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_sparse.config.calibration import CalibrationConfig
from modelopt_sparse.errors import ArgumentError, ConfigError, describe
from modelopt_sparse.faithfulness.probe import Probe
from modelopt_sparse.kernels.types import Phase
from modelopt_sparse.methods.calibrated import PHASES, PhaseName
from modelopt_sparse.modes.apply import check_model
from modelopt_sparse.module import SparseAttentionModule, counting_anew, observed

from .batches import Batches, batches_of, sequences
from .bound import COSTS
from .calibrated import calibrated_phases
from .check_results import CalibrationCheck, CheckRow
from .loop import device_of, run_prompts
from .prompts import held_out_prompts

Shares = dict[tuple[PhaseName, SparseAttentionModule], float]


@torch.no_grad()
def check_calibration(
    model: nn.Module,
    batches: Batches | None = None,
    config: CalibrationConfig | Mapping[str, Any] | None = None,
) -> CalibrationCheck:
    """Runs a calibrated model and counts, by phase and length, the tiles that it skips.

    Each sequence runs alone, as the model is: a prompt, and the tokens that the model writes after it.
    Sequences shorter than ``min_context`` are dense, and have no row. The model's statistics stay as they
    were.

    Args:
        model: a sparse model whose thresholds were calibrated. Modules and phases that are disabled, have a
            fixed lambda or a target of 0 aren't counted.
        batches: an iterable or a dataset, as `calibrate` takes it. They are taken one by one, so progress can
            be shown around them. None: prompts that `config` describes, and that `calibrate` doesn't make:
            other tasks, or other parts of the files, which overlap those where files are short; of lengths
            between those that it makes.
        config: as `calibrate` takes it. If it bounds an error or a dropped mass, each sequence runs once
            more, dense and sparse, to measure it. Shares are those of the model.
    Returns:
        A row for each phase and length of prompts.
    Raises:
        ConfigError: no enabled module is calibrated, or the configuration isn't taken.
        ArgumentError, ArgumentTypeError: not a model; a batch isn't what is taken; or no tiles were counted,
            for there are no batches, sequences are too short, or the model runs another attention.
    """
    check_model(model)
    chosen = CalibrationConfig() if config is None else CalibrationConfig.load(config)
    targets = _targets(model)
    modules = {module for _, module in targets}
    counted: dict[tuple[PhaseName, int], Tensor] = {}
    probes: dict[int, dict[SparseAttentionModule, Probe]] = {}
    made = held_out_prompts(model, chosen) if batches is None else batches_of("batches", batches)
    for ids in _sequences(model, made):
        with counting_anew(modules):
            run_prompts(model, [ids], chosen)
            for phase, tiles in _tiles(targets).items():
                place = phase, ids.shape[1]
                counted[place] = counted.get(place, torch.zeros_like(tiles)) + tiles
            if chosen.bound is not None:
                own = probes.setdefault(ids.shape[1], {module: Probe() for module in modules})
                with observed(own):
                    run_prompts(model, [ids], chosen)
    if not counted:
        takes = (
            "sequences of min_context keys or more, and a model whose attention is modelopt_triton"
        )
        raise ArgumentError(describe("batches", "none that a calibrated module skips in", takes))
    return CalibrationCheck(
        rows=tuple(
            _row(
                phase,
                length,
                counted[phase, length],
                *_bound_and_cost(phase, targets, probes.get(length, {}), chosen),
            )
            for phase, length in sorted(counted, key=lambda key: (PHASES.index(key[0]), key[1]))
        ),
        bounded=None if chosen.bound is None else COSTS[chosen.bound.name].name,
    )


def _targets(model: nn.Module) -> Shares:
    """The shares of tiles that enabled modules are to skip, where they are calibrated to skip any."""
    found = {
        (phase, module): threshold.target_sparsity
        for phase, _, module, threshold in calibrated_phases(model)
        if module.enabled and threshold.target_sparsity
    }
    if not found:
        remedy = "Call modelopt_sparse.calibrate, with a target above 0."
        takes = "one with an enabled module that is calibrated to skip"
        raise ConfigError(describe("model", "none", takes, remedy))
    return found


def _sequences(model: nn.Module, batches: Iterable[Any]) -> Iterator[Tensor]:
    device = device_of(model)
    for batch in batches:
        yield from sequences(batch, device)


def _tiles(targets: Shares) -> dict[PhaseName, Tensor]:
    """By phase: one sequence, tiles visible, to be skipped, and skipped, float64 [4], of all modules."""
    found: dict[PhaseName, Tensor] = {}
    for (phase, module), target in targets.items():
        counts = getattr(module.stats, phase).counts
        if counts is None:
            continue
        visible, skipped = int(counts.visible.sum()), int(counts.skipped[0].sum())
        tiles = torch.tensor([0, visible, target * visible, skipped], dtype=torch.float64)
        found[phase] = found.get(phase, torch.tensor([1.0, 0, 0, 0]).double()) + tiles
    return found


def _row(
    phase: PhaseName, length: int, tiles: Tensor, bound: float | None, cost: float | None
) -> CheckRow:
    ran, visible, wanted, skipped = tiles.tolist()
    return CheckRow(
        phase=phase,
        length=length,
        sequences=int(ran),
        target=wanted / visible,
        achieved=skipped / visible,
        bound=bound,
        cost=cost,
    )


def _bound_and_cost(
    phase: PhaseName,
    targets: Shares,
    probes: Mapping[SparseAttentionModule, Probe],
    config: CalibrationConfig,
) -> tuple[float | None, float | None]:
    """What skipping may cost in a phase, and what it does; None where the configuration doesn't bound it."""
    if config.bound is None or phase not in config.bound.of:
        return None, None
    cost = COSTS[config.bound.name]
    found = [probes[module].result(Phase(phase), None) for own, module in targets if own == phase]
    costs = [cost.found(one) for one in found if one is not None]
    of_all = max if config.thresholds_for == "layer" else cost.together
    return config.bound.of[phase], of_all(costs)

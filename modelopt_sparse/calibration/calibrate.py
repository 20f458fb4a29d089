"""Thresholds for a share of tiles, from one pass over some prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from modelopt_sparse.config.calibration import CalibrationConfig
from modelopt_sparse.errors import ArgumentTypeError, ConfigError, describe
from modelopt_sparse.kernels.types import Phase
from modelopt_sparse.methods.calibrated import CalibratedThreshold, PhaseName, SkipSoftmaxConfig
from modelopt_sparse.methods.fields import least_context
from modelopt_sparse.module import SparseAttentionModule, observed

from .curve import Curve
from .fit import formula_of, table_of
from .loop import run_prompts
from .prompts import prompts
from .ranks import of_all_ranks
from .recorder import Recorder, Tallies, added, by_length

Data = Callable[[nn.Module], object] | Iterable[Any] | None
"""What to calibrate with: a function that runs the model, batches of token ids, or None: made-up prompts."""


def calibrated(
    model: nn.Module,
    modules: Mapping[str, SparseAttentionModule],
    config: CalibrationConfig,
    data: Data = None,
) -> dict[str, SkipSoftmaxConfig]:
    """The configurations of the modules' methods with thresholds for the shares that `config` asks for.

    The model is as before, and what it computed for `data` was dense in these modules.

    Args:
        modules: by name, those to calibrate.

    Raises:
        ConfigError: a method has no thresholds, or too little was seen to calibrate a phase.
        ArgumentTypeError: `data` is something else.
        UnsupportedCall: attention is bidirectional.
    """
    methods = {name: module.method.config for name, module in modules.items()}
    for name, method in methods.items():
        if not isinstance(method, SkipSoftmaxConfig):
            takes = "methods that skip by a threshold"
            remedy = "Leave this module out, or give it triton_skip_softmax."
            raise ConfigError(describe(f"calibration of {name}", method.method, takes, remedy))
    targets = {phase: share for phase, share in config.target_sparse_ratio.items() if share}
    recorders = {
        name: Recorder(
            type(module.method)(
                module.method.config.with_thresholds(dict.fromkeys(targets, 1.0), 0)
            ).plan()
        )
        for name, module in modules.items()
    }
    with observed({module: recorders[name] for name, module in modules.items()}), torch.no_grad():
        _run(model, config, data)
    tallies = of_all_ranks({name: recorder.tallies for name, recorder in recorders.items()})
    thresholds = {
        phase: _thresholds(tallies, phase, share, config) for phase, share in targets.items()
    }
    shortest = min(
        (
            length
            for own in tallies.values()
            for phase in targets
            for length in by_length(own, Phase(phase))
        ),
        default=0,
    )
    dense: dict[PhaseName, Any] = {
        phase: 0.0 for phase, share in config.target_sparse_ratio.items() if not share
    }
    return {
        name: method.with_thresholds(
            dense | {phase: own[name] for phase, own in thresholds.items()},
            least_context(method.min_context) or shortest,
        )
        for name, method in methods.items()
        if isinstance(method, SkipSoftmaxConfig)
    }


def _run(model: nn.Module, config: CalibrationConfig, data: Data) -> None:
    if callable(data):
        data(model)
        return
    if data is not None and not isinstance(data, Iterable):
        takes = "a function of the model, an iterable of batches, or None"
        raise ArgumentTypeError(describe("forward_loop", repr(data)[:100], takes))
    run_prompts(model, prompts(model, config) if data is None else data, config)


def _thresholds(
    tallies: Mapping[str, Tallies], phase: PhaseName, share: float, config: CalibrationConfig
) -> dict[str, CalibratedThreshold]:
    """By module, its threshold in a phase."""
    if config.thresholds_for == "layer":
        return {name: _threshold(own, phase, share, config) for name, own in tallies.items()}
    shared = _threshold(added(tallies.values()), phase, share, config)
    return dict.fromkeys(tallies, shared)


def _threshold(
    tallies: Tallies, phase: PhaseName, share: float, config: CalibrationConfig
) -> CalibratedThreshold:
    curves = {
        length: Curve.of([histogram])
        for length, histogram in by_length(tallies, Phase(phase)).items()
    }
    if not curves:
        remedy = "Calibrate with prompts and, for decode, let the model write after them."
        got = f"no tokens in {phase}"
        raise ConfigError(describe("calibration", got, "some", remedy))
    formula = formula_of(curves)
    table = None
    if config.form == "table":
        table = table_of({length: [curve] for length, curve in curves.items()})
    return CalibratedThreshold(target_sparsity=share, formula=formula, table=table)

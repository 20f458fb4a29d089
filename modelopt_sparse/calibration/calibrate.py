"""Thresholds for a share of tiles, from one pass over some prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from modelopt_sparse.config.calibration import CalibrationConfig
from modelopt_sparse.errors import ConfigError, describe
from modelopt_sparse.kernels.types import Phase
from modelopt_sparse.methods.calibrated import PhaseName, SkipSoftmaxConfig
from modelopt_sparse.methods.fields import least_context
from modelopt_sparse.module import SparseAttentionModule, observed

from .batches import Batches, batches_of
from .bound import COSTS
from .budget import PROBES
from .derive import thresholds
from .loop import run_prompts
from .prompts import prompts
from .ranks import of_all_ranks, refuse_ranks
from .recorder import Recorder, shortest

Data = Callable[[nn.Module], object] | Batches | None
"""A function that runs the model; batches of token ids, or a dataset of them; or None: made-up prompts."""


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
        UnsupportedCall: attention is bidirectional, or heads are calibrated apart in several processes.
    """
    methods = {name: _method(name, module) for name, module in modules.items()}
    if config.thresholds_for == "head":
        refuse_ranks()
    # With a bound to keep, no share is asked for, and no phase is to be dense.
    shares, bound = config.shares, config.bound
    asked = list(bound.of if bound else [phase for phase, share in shares.items() if share])
    is_probed = bound is not None or config.thresholds_for == "head"
    weighs = bound is not None and COSTS[bound.name].is_mass
    recorders = {
        name: Recorder(
            type(module.method)(methods[name].with_thresholds(dict.fromkeys(asked, 1.0), 0)).plan(),
            PROBES if is_probed else (),
            weighs,
        )
        for name, module in modules.items()
    }
    with observed({module: recorders[name] for name, module in modules.items()}), torch.no_grad():
        _run(model, config, data)
    tallies = of_all_ranks({name: recorder.tallies for name, recorder in recorders.items()})
    found = {phase: thresholds(recorders, tallies, phase, config) for phase in asked}
    least = shortest(tallies.values(), [Phase(phase) for phase in asked])
    dense: dict[PhaseName, Any] = {phase: 0.0 for phase, share in shares.items() if not share}
    return {
        name: method.with_thresholds(
            dense | {phase: own[name] for phase, own in found.items()},
            least_context(method.min_context) or least,
        )
        for name, method in methods.items()
    }


def _method(name: str, module: SparseAttentionModule) -> SkipSoftmaxConfig:
    config = module.method.config
    if not isinstance(config, SkipSoftmaxConfig):
        takes = "methods that skip by a threshold"
        remedy = "Leave this module out, or give it triton_skip_softmax."
        raise ConfigError(describe(f"calibration of {name}", config.method, takes, remedy))
    return config


def _run(model: nn.Module, config: CalibrationConfig, data: Data) -> None:
    if callable(data):
        if config.chunk_size is not None:
            takes = "None where a function runs the model"
            raise ConfigError(describe("calibration.chunk_size", config.chunk_size, takes))
        data(model)
        return
    made = prompts(model, config) if data is None else batches_of("forward_loop", data)
    run_prompts(model, made, config)

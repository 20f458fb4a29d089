"""Thresholds of a sparse model, from the share of tiles that it shall skip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from modelopt_sparse.calibration.calibrate import Data, calibrated
from modelopt_sparse.config.calibration import CalibrationConfig, TargetSparsity
from modelopt_sparse.config.explain import explained
from modelopt_sparse.errors import ConfigError, describe
from modelopt_sparse.methods.base import SparseMethodConfig
from modelopt_sparse.methods.calibrated import CalibratedThreshold, PhaseName, SkipSoftmaxConfig
from modelopt_sparse.module import SparseAttentionModule
from modelopt_sparse.patterns import Pattern
from modelopt_sparse.sparse_parts import changed, chosen_modules


def calibrate_modules(model: nn.Module, config: CalibrationConfig, data: Data = None) -> None:
    """Gives the enabled sparse modules of `model` the thresholds that `calibrated` finds."""
    modules = {
        name: module for name, module in chosen_modules(model, "*").items() if module.enabled
    }
    if not modules:
        remedy = "Call enable_sparse_attention first."
        raise ConfigError(describe("calibration", "no enabled module", "at least one", remedy))
    with changed(model):
        _replace(modules, calibrated(model, modules, config, data))


def set_sparsity(
    model: nn.Module, target: float | Mapping[str, float], pattern: Pattern = "*"
) -> nn.Module:
    """Changes the share of tiles that a calibrated model skips. Nothing is calibrated again.

    Args:
        target: the share of visible tiles to skip, from 0 (dense) to below 1: for every phase that is
            calibrated, or by phase: ``{"prefill": 0.6, "decode": 0.3}``.
        pattern: which of the sparse modules.
    Returns:
        `model`.
    Raises:
        ConfigError: no such share; a module that matches isn't calibrated in a phase; or the pattern
            matches no sparse module. The model is as before.
        UnsupportedModel: `model` is only a part of the model that was made sparse.
    """
    modules = chosen_modules(model, pattern)
    try:
        targets = TypeAdapter(TargetSparsity).validate_python(target)
    except ValidationError as error:
        raise explained(error, "target") from None
    replaced = {
        name: _at(name, module.method.config, targets, must_have=isinstance(target, Mapping))
        for name, module in modules.items()
    }
    with changed(model):
        _replace(modules, replaced)
    return model


def _at(
    name: str, config: SparseMethodConfig, targets: Mapping[PhaseName, float], must_have: bool
) -> SparseMethodConfig:
    """The configuration with these shares.

    Args:
        must_have: every phase of `targets` is to be calibrated; if not, one at least.
    """
    found: dict[PhaseName, Any] = {}
    if isinstance(config, SkipSoftmaxConfig):
        found = {
            phase: threshold.at(share)
            for phase, share in targets.items()
            if isinstance(threshold := config.threshold(phase), CalibratedThreshold)
        }
    missing = [phase for phase in targets if phase not in found]
    if not found or (must_have and missing):
        got = f"no calibrated threshold in {' and '.join(missing)}"
        remedy = "Call modelopt_sparse.calibrate, or name the phases and modules that are."
        raise ConfigError(describe(name, got, "a calibrated module", remedy))
    assert isinstance(config, SkipSoftmaxConfig)
    return config.with_thresholds(found, config.min_context)


def _replace(
    modules: Mapping[str, SparseAttentionModule], configs: Mapping[str, SparseMethodConfig]
) -> None:
    for name, module in modules.items():
        module.set_method(type(module.method)(configs[name]))

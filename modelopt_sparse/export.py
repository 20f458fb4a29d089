"""What a sparse model does, in the schema that serving engines read from config.json."""

from __future__ import annotations

import glob
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from modelopt_sparse.errors import ConfigError, UnsupportedModel, describe
from modelopt_sparse.methods.calibrated import (
    FORMULA,
    PHASES,
    CalibratedThreshold,
    ScaleFormula,
    SkipSoftmaxConfig,
)
from modelopt_sparse.methods.sparse_softmax import NMFields, nm_part
from modelopt_sparse.models.attention import attention_targets
from modelopt_sparse.modes.apply import check_model
from modelopt_sparse.modes.state import producer
from modelopt_sparse.module import SparseAttentionModule
from modelopt_sparse.module_state import sparse_modules


def export_sparse_attention_config(model: nn.Module) -> dict[str, Any]:
    """The ``sparse_attention_config`` that TensorRT-LLM, vLLM-Omni and NVIDIA Model-Optimizer read.

    Engines decide on tiles of their own, at every length. So decision tiles, ``min_context``, ``backend`` and
    a table that was measured beside the formula aren't in it: ``save_pretrained`` keeps these. N:M sparsity
    is known to Model-Optimizer alone, which takes no ``ignore`` there.

    Args:
        model: a sparse model whose thresholds were calibrated, with a formula; or one with N:M sparsity.
    Returns:
        Plain data: ``config_groups`` with one group, and ``producer``. ``targets`` are the classes of the
        modules that leave something out, ``ignore`` the names of all other attention modules; there is none
        where these are all. A phase that is dense has no coefficients and no target. Its JSON schema is the
        package's ``schemas/sparse_attention_config.schema.json``.
    Raises:
        ArgumentTypeError: not a module.
        UnsupportedModel: not a transformers model but something round one, or one without attention that can
            be made sparse.
        ConfigError: nothing is left out, or something that the schema has no form for: a lambda that isn't
            calibrated, a table without a formula, another method, modules that differ.
    """
    check_model(model)
    if not isinstance(model, PreTrainedModel):
        takes = "a transformers model, for a wrapper gives modules names that engines don't know"
        raise UnsupportedModel(describe("model", f"a {type(model).__name__}", takes, "Unwrap it."))
    targets = attention_targets(model)
    groups = {
        name: group
        for name, module in sparse_modules(model)
        if module.enabled and (group := _group(name, module))
    }
    if not groups:
        remedy = "Call modelopt_sparse.sparsify, with thresholds that are calibrated."
        takes = "a model with a module that leaves something out"
        raise ConfigError(describe("model", "one that is dense", takes, remedy))
    first, *others = groups
    for name in others:
        if groups[name] != groups[first]:
            takes = f"what {first} has, {groups[first]}, for engines take one group"
            remedy = "Give both the same thresholds, or disable one."
            raise ConfigError(describe(name, groups[name], takes, remedy))
    algorithm, *fields = groups[first].items()
    # Engines match these names as globs.
    ignore = [glob.escape(name) for name in targets if name not in groups]
    group = {
        **dict([algorithm]),
        "targets": sorted({targets[name].class_name for name in groups}),
        **({"ignore": ignore} if ignore else {}),
        **dict(fields),
    }
    return {"config_groups": {"group_0": group}, "producer": producer()}


def _group(name: str, module: SparseAttentionModule) -> dict[str, Any]:
    """The algorithm of an enabled module and its numbers; empty where it is dense."""
    config = module.method.config
    if not isinstance(config, SkipSoftmaxConfig | NMFields):
        takes = "skip-softmax with calibrated thresholds, or N:M sparsity"
        remedy = "Disable the module, or give it a method that does one of these."
        raise ConfigError(describe(name, f"method {config.method!r}", takes, remedy))
    skip = _skip_softmax(name, config) if isinstance(config, SkipSoftmaxConfig) else {}
    nm = _sparse_softmax(config) if isinstance(config, NMFields) else {}
    if skip and nm:
        takes = "one of them, for engines take one group"
        raise ConfigError(describe(name, "skip-softmax and N:M sparsity", takes))
    return skip or nm


def _sparse_softmax(config: NMFields) -> dict[str, Any]:
    nm = nm_part(config)
    if nm is None:
        return {}
    return {
        "algorithm": "sparse_softmax",
        "sparsity_n": nm.n,
        "sparsity_m": nm.m,
        "dense_sink_tokens": nm.num_sink_tokens,
        "dense_recent_tokens": nm.dense_window_size,
    }


def _skip_softmax(name: str, config: SkipSoftmaxConfig) -> dict[str, Any]:
    coefficients, shares = {}, {}
    for phase in PHASES:
        threshold = config.threshold(phase)
        if _is_dense(threshold):
            continue
        calibrated, formula = _calibrated(f"{name}, {phase}", threshold)
        coefficients[phase] = {"a": formula.a, "b": formula.b}
        shares[phase] = calibrated.target_sparsity
    if not shares:
        return {}
    return {
        "algorithm": "skip_softmax",
        "threshold_scale_factor": {"formula": FORMULA, **coefficients},
        "target_sparsity": shares,
    }


def _is_dense(threshold: float | CalibratedThreshold | None) -> bool:
    # Here a share of 0 is dense; engines would skip by the factor that the formula has for it.
    return not (
        threshold.target_sparsity if isinstance(threshold, CalibratedThreshold) else threshold
    )


def _calibrated(
    place: str, threshold: float | CalibratedThreshold | None
) -> tuple[CalibratedThreshold, ScaleFormula]:
    takes = "a calibrated threshold that has a formula, which is all that engines read"
    if not isinstance(threshold, CalibratedThreshold):
        got = f"a fixed lambda, {threshold}"
        raise ConfigError(describe(place, got, takes, "Calibrate the model first."))
    if threshold.formula is None:
        got = "a table without a formula"
        raise ConfigError(describe(place, got, takes, "Calibrate it with a formula."))
    return threshold, threshold.formula

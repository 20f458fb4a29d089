"""Sparse attention in transformers' continuous batching."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PretrainedConfig

from modelopt_sparse.errors import UnsupportedModel, describe
from modelopt_sparse.integrations.hf import ATTENTION_NAME
from modelopt_sparse.integrations.hf_paged import (
    ENTRY,
    PAGED_MODEL_NAME,
    PAGED_NAME,
    refuse_continuous_batching,
)
from modelopt_sparse.models.attention import uses_attention_interface
from modelopt_sparse.modes.apply import check_model


@contextmanager
def continuous_batching(model: nn.Module) -> Iterator[None]:
    """Within it, ``model.generate_batch`` and the managers of `model` run its own attention, sparse or not.

    transformers gives names of its own to attention in continuous batching. So while the block runs, the
    attention modules have configurations that name ours, and what prepares the batches sees another name.
    Managers are to be stopped before the block is left. Inside of it other calls of the model raise
    `UnsupportedCall`, and it can't be made sparse or dense.

    Args:
        model: a sparse model, or one with ``attn_implementation="modelopt_triton"``.
    Raises:
        UnsupportedModel: no module of `model` runs this package's attention.
        ArgumentTypeError: not a module.
    """
    check_model(model)
    holders = [
        (module, config)
        for module in model.modules()
        if isinstance(config := module.__dict__.get("config"), PretrainedConfig)
    ]
    if not any(_runs_ours(module, config) for module, config in holders):
        got = f"a {type(model).__name__} in which no module runs {ATTENTION_NAME}"
        raise UnsupportedModel(describe("model", got, "a sparse model", "Call sparsify first."))
    named = [
        (config, config._attn_implementation_internal)
        for module, config in holders
        if _names_ours(config) or hasattr(type(module), ENTRY)
    ]
    attention = [(module, config) for module, config in holders if _runs_ours(module, config)]
    refusing = [
        module for module, _ in holders if module.__dict__.get(ENTRY) is refuse_continuous_batching
    ]
    try:
        for module, config in attention:
            own = module.__dict__["config"] = copy.copy(config)
            own._attn_implementation_internal = PAGED_NAME
        for config, _ in named:
            config._attn_implementation_internal = PAGED_MODEL_NAME
        for module in refusing:
            del module.__dict__[ENTRY]
        yield
    finally:
        for module, config in attention:
            module.__dict__["config"] = config
        for config, name in named:
            config._attn_implementation_internal = name
        for module in refusing:
            module.__dict__[ENTRY] = refuse_continuous_batching


def _names_ours(config: PretrainedConfig) -> bool:
    return bool(config._attn_implementation == ATTENTION_NAME)


def _runs_ours(module: nn.Module, config: PretrainedConfig) -> bool:
    return _names_ours(config) and uses_attention_interface(module)

"""The ``sparse_attention_config`` block of a Hugging Face config.json, written and read back.

A checkpoint with the block loads as the dense model it is wherever this package isn't used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from torch import nn
from transformers import PretrainedConfig

from modelopt_sparse.config import SparseAttentionConfig
from modelopt_sparse.config.checkpoints import BLOCK_NAMES
from modelopt_sparse.errors import StateError, describe, shown
from modelopt_sparse.modes.state import producer
from modelopt_sparse.modes.versions import Steps, newest, unchanged, up_to_date

# From version 2 on, thresholds may be calibrated ones.
BLOCK_STEPS: Steps = {1: unchanged}
BLOCK_VERSION = newest(BLOCK_STEPS)


def write_block(
    model: nn.Module, config: SparseAttentionConfig, modules: Mapping[str, Mapping[str, Any]]
) -> None:
    """Puts the block into ``model.config``, so that ``save_pretrained`` writes it.

    Callables can't be written: then the rules in the block name each module instead.
    """
    holder = getattr(model, "config", None)
    if not isinstance(holder, PretrainedConfig):
        return
    if any(callable(pattern) for pattern in config.sparse_cfg):
        rules = {
            name: {"enable": state["enable"], **state["fields"]} for name, state in modules.items()
        }
        config = SparseAttentionConfig(sparse_cfg=rules)
    content = config.to_dict()
    # transformers sorts the keys of config.json, and the order of the rules has a meaning.
    content["sparse_cfg"] = [list(rule) for rule in content["sparse_cfg"].items()]
    block = {
        "producer": producer(),
        "block_version": BLOCK_VERSION,
        "config": content,
        "metadata": {"modules": modules},
    }
    setattr(holder, BLOCK_NAMES[0] if _free_or_ours(holder) else BLOCK_NAMES[1], block)


def take_block(model: nn.Module) -> dict[str, Any]:
    """Configuration and metadata of the block in ``model.config``, from where it is removed.

    What the model does from then on is for `write_block` to say.

    Raises:
        StateError: there is none, it is malformed, or a newer version wrote it.
    """
    holder = getattr(model, "config", None)
    for name in BLOCK_NAMES:
        block = getattr(holder, name, None)
        if is_ours(block):
            taken = _content(name, up_to_date(f"{name}.", block, "block_version", BLOCK_STEPS))
            delattr(holder, name)
            return taken
    raise StateError(
        describe(
            "config.json",
            f"no {BLOCK_NAMES[0]} block of modelopt_sparse",
            "a checkpoint saved from a sparse model",
            "Load it with transformers and call sparsify.",
        )
    )


def _content(name: str, block: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration and metadata of a block, with the rules as a mapping again."""
    config, metadata = block.get("config"), block.get("metadata")
    rules = config.get("sparse_cfg") if isinstance(config, Mapping) else None
    if not isinstance(rules, list) or not all(
        isinstance(rule, list) and len(rule) == 2 and isinstance(rule[0], str) for rule in rules
    ):
        takes = "a mapping whose sparse_cfg is a list of patterns and rules"
        raise StateError(describe(f"{name}.config", shown(config), takes))
    by_pattern = dict(rules)
    if len(by_pattern) < len(rules):
        takes = "each pattern once"
        raise StateError(describe(f"{name}.config.sparse_cfg", "a pattern twice", takes))
    assert isinstance(config, Mapping)
    return {"config": {**config, "sparse_cfg": by_pattern}, "metadata": metadata}


def _free_or_ours(config: PretrainedConfig) -> bool:
    block = getattr(config, BLOCK_NAMES[0], None)
    return block is None or is_ours(block)


def is_ours(block: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a block of a configuration was written by this package."""
    if not isinstance(block, Mapping):
        return False
    writer = block.get("producer")
    return isinstance(writer, Mapping) and writer.get("name") == "modelopt_sparse"

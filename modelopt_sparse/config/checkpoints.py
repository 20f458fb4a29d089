"""Reads the ``sparse_attention_config`` of a checkpoint's config.json, as serving engines do, into rules.

NVIDIA Model-Optimizer has written it in three forms: ``config_groups`` with a group that holds everything;
older, a group with ``sparse_algo``, and coefficients beside ``config_groups``; and flat, with no group.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from modelopt_sparse.errors import ArgumentTypeError, ConfigError, describe, shown

from .checkpoint_thresholds import mapping_at, only_keys, skip_softmax_fields
from .files import read_mapping
from .rules import DEFAULT

# The second name is used where a model family has a block of the first name with a meaning of its own.
BLOCK_NAMES = ("sparse_attention_config", "modelopt_sparse_attention_config")

MAX_CONFIG_BYTES = 16 * 2**20
"""A config.json is at most this long; some list thousands of labels."""

_ALGORITHM_KEYS = ("algorithm", "sparse_algo")
_GROUP_KEYS = (*_ALGORITHM_KEYS, "targets", "ignore")
_SKIP_KEYS = ("threshold_scale_factor", "target_sparsity", "target_sparse_ratio")
# What Model-Optimizer calls the attention of any class, where an engine ran the model for it.
_ANY_ATTENTION = "Attention"
# One left out has the same default here and in Model-Optimizer.
_NM_KEYS = ("sparsity_n", "sparsity_m", "dense_sink_tokens", "dense_recent_tokens")


def checkpoint_rules(
    directory: str | PathLike[str], target_sparsity: object
) -> dict[str, dict[str, Any]]:
    """The rules that the block in the folder's config.json comes to.

    Args:
        target_sparsity: in place of the block's own; None takes that.
    Raises:
        FileNotFoundError: no config.json there.
        ArgumentTypeError: `directory` is no path.
        ConfigError: what is said there isn't taken.
    """
    if not isinstance(directory, str | PathLike):
        raise ArgumentTypeError(describe("directory", repr(directory), "the path of a checkpoint"))
    if Path(directory).is_file():
        takes = "the folder of a checkpoint, with a config.json"
        raise ConfigError(describe("directory", f"the file {str(directory)!r}", takes))
    path = Path(directory) / "config.json"
    config = read_mapping(path, MAX_CONFIG_BYTES)
    try:
        return _rules(_only_group(config), target_sparsity)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _only_group(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one group of the block, whatever its form."""
    for name in BLOCK_NAMES:
        if isinstance(config.get(name), Mapping) and "block_version" in config[name]:
            takes = "what serving engines read"
            remedy = "Load the checkpoint with modelopt_sparse.from_pretrained."
            raise ConfigError(describe(name, "what a sparse model saved", takes, remedy))
    place = BLOCK_NAMES[0]
    block = mapping_at(config, place, "")
    beside = {key: block[key] for key in block if key not in ("producer", "config_groups")}
    if "config_groups" not in block:
        # Flat: skip-softmax is the only algorithm that was ever written so.
        named = any(key in beside for key in _ALGORITHM_KEYS)
        return beside if named else {"algorithm": "skip_softmax", **beside}
    groups = mapping_at(block, "config_groups", place)
    if len(groups) != 1:
        got, takes = f"{len(groups)} groups", "one group, for a module has one method here"
        raise ConfigError(describe("config_groups", got, takes, "Leave one of them in the file."))
    group = mapping_at(groups, next(iter(groups)), "config_groups")
    if twice := sorted(group.keys() & beside.keys()):
        raise ConfigError(describe(twice[0], "in a group and beside it", "it once"))
    return {**group, **beside}


def _rules(group: Mapping[str, Any], target_sparsity: object) -> dict[str, dict[str, Any]]:
    algorithms = [group[key] for key in _ALGORITHM_KEYS if key in group]
    if algorithms in (["skip_softmax"], ["softmax_skip"]):
        only_keys(group, (*_GROUP_KEYS, *_SKIP_KEYS), BLOCK_NAMES[0])
        fields = skip_softmax_fields(group, target_sparsity)
    elif algorithms == ["sparse_softmax"]:
        if target_sparsity is not None:
            takes = "None for N:M sparsity, whose share is N of M"
            raise ConfigError(describe("target_sparsity", shown(target_sparsity), takes))
        only_keys(group, (*_GROUP_KEYS, *_NM_KEYS), BLOCK_NAMES[0])
        written = {key: group[key] for key in _NM_KEYS if key in group}
        fields = {"method": "triton_sparse_softmax", **written}
    else:
        takes = "'skip_softmax' or 'sparse_softmax'"
        got = ", ".join(map(shown, algorithms)) or "nothing"
        raise ConfigError(describe("algorithm", got, takes))
    # Without targets it is about all attention, and "*" is all that is causal.
    patterns = [
        "*" if name == _ANY_ATTENTION else f"type:{name}" for name in _globs(group, "targets")
    ] or ["*"]
    return {
        DEFAULT: {"enable": False},
        **dict.fromkeys(patterns, fields),
        **{name: {"enable": False} for name in _globs(group, "ignore")},
    }


def _globs(group: Mapping[str, Any], key: str) -> list[str]:
    names = group.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(describe(key, shown(names), "a list of names"))
    for name in names:
        # To engines these are plain characters; in a pattern of ours they would mean something.
        if name == DEFAULT or set(name) & set("{}:"):
            raise ConfigError(describe(key, repr(name), "names and globs with *, ? and [] only"))
    return names

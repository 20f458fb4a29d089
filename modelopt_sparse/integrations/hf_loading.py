"""Loads a checkpoint with transformers, as content that anyone may have written."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils.hub import cached_file

from modelopt_sparse.errors import (
    ArgumentTypeError,
    SparseAttentionError,
    StateError,
    describe,
    shown,
)
from modelopt_sparse.files import parse_json, read_bytes

MAX_CONFIG_BYTES = 256 * 2**20
"""A config.json is at most this long. Thresholds of every head of a large model take tens of MB."""

# transformers runs what these name, which may be a kernel that it downloads.
_IMPLEMENTATIONS = frozenset(
    f"{prefix}{kind}_implementation{suffix}"
    for prefix in ("", "_")
    for kind in ("attn", "experts")
    for suffix in ("", "_internal")
)
# By these it takes values from other keys and files than those that are looked at here.
_ELSEWHERE = frozenset({"attribute_map", "configuration_files"})
_HUB = (
    "cache_dir",
    "force_download",
    "proxies",
    "token",
    "revision",
    "local_files_only",
    "subfolder",
)


def load_checkpoint(
    auto_class: Any, path: str | PathLike[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """What ``auto_class.from_pretrained`` returns.

    Raises:
        ArgumentTypeError: a class that has none, or no path.
        FileNotFoundError: nothing at an absolute path, or a folder without config.json or safetensors.
        StateError: config.json names an implementation; a folder's files are malformed or lack weights.
    """
    loader = getattr(auto_class, "from_pretrained", None)
    if loader is None:
        takes = "a transformers class with from_pretrained, such as AutoModelForCausalLM"
        raise ArgumentTypeError(describe("auto_class", repr(auto_class), takes))
    if not isinstance(path, str | PathLike):
        raise ArgumentTypeError(describe("path", repr(path), "a path or the name of a model"))
    if Path(path).is_absolute() and not Path(path).exists():
        raise FileNotFoundError(path)
    options = {"use_safetensors": True, "trust_remote_code": False, **kwargs}
    check_configuration(path, options)
    if options["use_safetensors"]:
        _check_has_safetensors(Path(path), options)
    wants_info = options.pop("output_loading_info", False)
    try:
        model, info = loader(path, *args, output_loading_info=True, **options)
    except (SparseAttentionError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        from_system = isinstance(error, OSError) and error.errno is not None
        if from_system or not (Path(path).exists() or isinstance(error, SafetensorError)):
            raise
        problem = f"{type(error).__name__}: {str(error)[:1000]}"
        raise StateError(f"{path}: transformers can't load it: {problem}") from error
    if wants_info:
        return model, info
    if info["missing_keys"]:
        got = f"no weights for {shown(sorted(info['missing_keys']))}"
        remedy = "With output_loading_info=True they are what transformers initialises."
        raise StateError(describe(str(path), got, "weights for all of the model", remedy))
    return model


def check_configuration(path: str | PathLike[str], options: Mapping[str, Any]) -> None:
    """Reads config.json as transformers will, and nothing else: before transformers obeys it.

    Args:
        path: a folder, a configuration file, or the name of a model.
        options: of ``from_pretrained``.

    Raises:
        FileNotFoundError, OSError: there is none.
        StateError: it is malformed, or says what implementation runs, there or elsewhere.
    """
    hub = {name: options[name] for name in _HUB if name in options}
    if Path(path).is_file():
        file = Path(path)
    elif Path(path).is_dir():
        file = _folder(Path(path), options) / "config.json"
    else:
        file = Path(str(cached_file(path, "config.json", **hub)))
    content = read_bytes(file, MAX_CONFIG_BYTES, StateError)
    try:
        config = parse_json(content)
    except (ValueError, RecursionError) as error:
        raise StateError(f"{file}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise StateError(describe(str(file), shown(config), "a mapping"))
    _check_keys(file, config)


def _folder(path: Path, options: Mapping[str, Any]) -> Path:
    return path / (options.get("subfolder") or "")


def _check_has_safetensors(path: Path, options: Mapping[str, Any]) -> None:
    folder = _folder(path, options)
    if path.is_dir() and not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(folder / "model.safetensors")


def _check_keys(file: Path, config: Mapping[str, Any]) -> None:
    left: list[Any] = [config]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if named := _IMPLEMENTATIONS & value.keys():
                remedy = "Remove it, and name one when you load."
                takes = "a file that leaves implementations to who loads it"
                raise StateError(describe(str(file), sorted(named)[0], takes, remedy))
            if other := _ELSEWHERE & value.keys():
                takes = "a file with all that it says, under the names that it has"
                raise StateError(describe(str(file), sorted(other)[0], takes))
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)

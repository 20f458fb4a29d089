"""Weights and applied modes of a model in one folder: safetensors and JSON, nothing executable."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from modelopt_sparse.errors import ArgumentTypeError, StateError, UnsupportedModel, describe, shown
from modelopt_sparse.files import check_is_file, parse_json, read_bytes, written_whole

from .apply import check_model
from .state import modelopt_state, restore_from_modelopt_state
from .undo import undone_on_failure

STATE_FILE = "modelopt_state.json"
WEIGHTS_FILE = "model.safetensors"

MAX_STATE_BYTES = 256 * 2**20
"""A state is at most this long. Thresholds of every head of a large model take tens of MB."""

# In the state and in the metadata of the weights: both are of one save, or a process was killed between.
_STATE_HASH = "state_sha256"


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes weights and modes into the folder `path`, each file whole or not at all.

    Raises:
        ConfigError: a configuration that can't be saved (callables as patterns). Nothing is written.
        StateError: the state of a mode can't be saved. Nothing is written.
        UnsupportedModel: weights that are offloaded or sharded. Nothing is written.
    """
    folder = _folder(path)
    state = modelopt_state(model)
    digest = sha256(json.dumps(state).encode()).hexdigest()
    text = json.dumps({**state, _STATE_HASH: digest}, allow_nan=False).encode()
    if len(text) > MAX_STATE_BYTES:
        raise StateError(describe("state", f"{len(text)} bytes", f"at most {MAX_STATE_BYTES}"))
    _check_weights_are_here(model)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        written_whole(folder / STATE_FILE) as new_state,
        written_whole(folder / WEIGHTS_FILE) as new_weights,
    ):
        new_state.write_bytes(text)
        save_model(model, str(new_weights), {"format": "pt", _STATE_HASH: digest})


def restore(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Loads the weights and applies the modes that `save` wrote. Returns the model.

    Args:
        model: an unconverted model of the same architecture.

    Raises:
        FileNotFoundError: a file is missing.
        StateError: the state or the weights are malformed or don't fit. The model is as before.
        UnsupportedModel: weights that are offloaded or sharded.
    """
    folder = _folder(path)
    check_model(model)
    _check_weights_are_here(model)
    state = _read_state(folder / STATE_FILE)
    weights = folder / WEIGHTS_FILE
    check_is_file(weights, StateError)
    try:
        with safe_open(weights, "pt") as file:
            metadata = file.metadata() or {}
            saved = {key: _shape_and_kind(file.get_slice(key)) for key in list(file.keys())}
        if _STATE_HASH in state and metadata.get(_STATE_HASH, "") != state[_STATE_HASH]:
            takes = f"the weights that were saved with {STATE_FILE}"
            raise StateError(describe(str(weights), "the weights of another save", takes))
        with undone_on_failure(model):
            _check_fit(weights, saved, model)
            restore_from_modelopt_state(model, state)
            # A mode may have added tensors, so only now is a name known to be one too many.
            unknown = sorted(set(saved) - set(model.state_dict()))
            if unknown:
                got = f"tensors of other names: {shown(unknown)}"
                raise StateError(describe(str(weights), got, "the tensors of the restored model"))
            load_model(model, str(weights))
    except SafetensorError as error:
        raise StateError(f"{weights}: not safetensors: {error}") from error
    return model


def _folder(path: object) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise ArgumentTypeError(describe("path", repr(path), "a path"))
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise StateError(describe("path", f"the file {str(folder)!r}", "a folder"))
    return folder


def _check_weights_are_here(model: nn.Module) -> None:
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            problem = f"a {type(value).__name__}"
        elif value.is_meta:
            problem = "offloaded"
        elif hasattr(value, "full_tensor"):
            # A DTensor. A build of torch may be without that class.
            problem = "sharded"
        else:
            continue
        remedy = "Gather the weights on one process, without offloading, first."
        takes = "tensors with all their values"
        raise UnsupportedModel(describe("model", f"{name}, which is {problem}", takes, remedy))


def _read_state(path: Path) -> dict[str, Any]:
    content = read_bytes(path, MAX_STATE_BYTES, StateError)
    try:
        state = parse_json(content)
    except (ValueError, RecursionError) as error:
        raise StateError(f"{path}: not JSON: {error}") from error
    if not isinstance(state, dict):
        raise StateError(describe(str(path), shown(state), "a mapping"))
    return state


def _shape_and_kind(tensor: Any) -> tuple[tuple[int, ...], bool]:
    """The shape of a tensor in a file, and whether it holds floating-point numbers of whole bytes."""
    dtype = tensor.get_dtype()
    is_floating = dtype.startswith(("F", "BF")) and not dtype.startswith(("F4", "F6"))
    return tuple(tensor.get_shape()), is_floating


def _check_fit(
    path: Path, saved: dict[str, tuple[tuple[int, ...], bool]], model: nn.Module
) -> None:
    """Raises StateError where the model has tensors that the file doesn't, or of another shape or kind."""
    own = model.state_dict(keep_vars=True)
    fits = {key: (tuple(own[key].shape), own[key].is_floating_point()) for key in own}
    wrong = [key for key in saved if key in own and saved[key] != fits[key]]
    # Tied tensors are written once.
    present = {own[key].data_ptr() for key in saved if key in own}
    missing = [key for key in own if key not in saved and own[key].data_ptr() not in present]
    if wrong or missing:
        got = f"tensors of another shape or kind {shown(wrong)}, missing {shown(missing)}"
        raise StateError(describe(str(path), got, "the tensors of the model"))

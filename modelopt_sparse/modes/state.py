"""A model's applied modes as plain data, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from modelopt_sparse.errors import (
    ArgumentError,
    ArgumentTypeError,
    ConfigError,
    StateError,
    describe,
    shown,
)
from modelopt_sparse.version import __version__

from .apply import check_model, parse_config, parts_with_modes, record, update_record
from .registry import get_mode
from .undo import undone_on_failure
from .versions import Steps, newest, unchanged, up_to_date

# From version 2 on, thresholds may be calibrated ones.
STATE_STEPS: Steps = {1: unchanged}
STATE_VERSION = newest(STATE_STEPS)

MAX_MODES = 100
"""A state holds so many modes at most."""


def producer() -> dict[str, str]:
    """Who wrote a state: this package and its version."""
    return {"name": "modelopt_sparse", "version": __version__}


def modelopt_state(model: nn.Module) -> dict[str, Any]:
    """The modes applied to `model`, in order, with configuration and metadata. JSON-able.

    Raises:
        ArgumentTypeError: not a module.
        ConfigError: a configuration that can't be saved (callables).
        StateError: modes were applied to a part of the model rather than to the model; or a mode's
            configuration or metadata isn't JSON.
    """
    check_model(model)
    parts = [name for name, _ in parts_with_modes(model) if name]
    if parts:
        got = f"one whose part {parts[0]!r} has modes of its own"
        takes = "a model that modes were applied to as a whole"
        raise StateError(describe("model", got, takes, "Save that part."))
    return {
        "state_version": STATE_VERSION,
        "producer": producer(),
        "modes": [
            {
                "mode": entry.mode,
                "config": _plain(entry.mode, get_mode(entry.mode).dump_config(entry.config)),
                "metadata": _plain(entry.mode, entry.metadata),
            }
            for entry in update_record(model)
        ],
    }


def restore_from_modelopt_state(model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """Applies the modes of a state to a model of the same architecture. Returns the model.

    Every entry is checked before the first is restored; if one fails, the model is as before.

    Raises:
        StateError: not a state, a newer version, modes were applied already, or it doesn't fit the model.
    """
    check_model(model)
    if parts_with_modes(model):
        raise StateError(
            describe(
                "model", "a model with modes applied", "an unconverted one", "Undo them first."
            )
        )
    try:
        entries = [
            (
                mode := get_mode(entry["mode"]),
                parse_config(mode, entry["config"]),
                entry["metadata"],
            )
            for entry in _modes_of(state)
        ]
        with undone_on_failure(model):
            for mode, config, metadata in entries:
                mode.restore(model, config, metadata)
                record(model, mode, config, dict(metadata))
    except StateError:
        raise
    # TypeError: a key that is no text. ArgumentError: numbers that a method takes and a kernel doesn't.
    except (ConfigError, ArgumentError, ArgumentTypeError, TypeError, RecursionError) as error:
        raise StateError(f"state: {str(error)[:2000]}") from error
    return model


def _plain(mode: str, data: object) -> Any:
    """A copy of `data`, which is JSON: the record stays as it is, whatever is done to the state."""
    try:
        return json.loads(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise StateError(f"mode {mode!r}: its state is not JSON: {error}") from error


def _modes_of(state: object) -> list[Mapping[str, Any]]:
    if not isinstance(state, Mapping):
        raise StateError(describe("state", shown(state), "a mapping from modelopt_state"))
    modes = up_to_date("", state, "state_version", STATE_STEPS).get("modes")
    keys = {"mode", "config", "metadata"}
    if not isinstance(modes, list) or not all(
        isinstance(entry, Mapping) and set(entry) == keys and isinstance(entry["metadata"], Mapping)
        for entry in modes
    ):
        raise StateError(describe("state['modes']", shown(modes), f"a list of {sorted(keys)}"))
    if len(modes) > MAX_MODES:
        raise StateError(describe("state['modes']", f"{len(modes)} modes", f"at most {MAX_MODES}"))
    return modes

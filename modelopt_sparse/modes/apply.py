"""Applying modes to a model, and the record of what was applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ValidationError
from torch import nn

from modelopt_sparse.errors import ArgumentError, ArgumentTypeError, ConfigError, describe

from .base import Metadata, Mode
from .registry import get_mode
from .undo import undone_on_failure

_RECORD = "_applied_modes"


@dataclass(frozen=True)
class AppliedMode:
    """One mode that was applied to a model."""

    mode: str
    config: BaseModel
    metadata: Metadata


def applied_modes(model: nn.Module) -> tuple[AppliedMode, ...]:
    """The modes applied to `model`, in order. Travels with deepcopy and pickle."""
    check_model(model)
    entries: tuple[AppliedMode, ...] = model.__dict__.get(_RECORD, ())
    return entries


def apply_mode(model: nn.Module, mode: str, config: BaseModel | Mapping[str, Any]) -> nn.Module:
    """Converts `model` in place by a registered mode, records it, and returns the model.

    Raises:
        ArgumentTypeError: `model` is no module.
        ConfigError: no such mode, or not its configuration. Or whatever the mode raises; then the model
            and its record are as before.
    """
    check_model(model)
    handler = get_mode(mode)
    parsed = parse_config(handler, config)
    with undone_on_failure(model):
        record(model, handler, parsed, handler.convert(model, parsed))
    return model


def record(model: nn.Module, mode: Mode[Any], config: BaseModel, metadata: Metadata) -> None:
    """Notes that `mode` was applied."""
    if mode.replaces_itself:
        forget_mode(model, mode.name)
    model.__dict__[_RECORD] = (*applied_modes(model), AppliedMode(mode.name, config, metadata))


def forget_mode(model: nn.Module, mode: str) -> None:
    """Drops a mode from the record of the model and of its parts, once its change was undone."""
    check_model(model)
    for _, part in parts_with_modes(model):
        left = tuple(entry for entry in applied_modes(part) if entry.mode != mode)
        if left:
            part.__dict__[_RECORD] = left
        else:
            del part.__dict__[_RECORD]


def parts_with_modes(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules, of `model` itself and within it, that modes were applied to, by dotted name."""
    return [(name, part) for name, part in model.named_modules() if applied_modes(part)]


def update_record(model: nn.Module) -> tuple[AppliedMode, ...]:
    """Asks every applied mode for its metadata as of now, and records it."""
    entries = tuple(
        replace(entry, metadata=get_mode(entry.mode).update(model, entry.config, entry.metadata))
        for entry in applied_modes(model)
    )
    if entries:
        model.__dict__[_RECORD] = entries
    return entries


def parse_config(mode: Mode[Any], config: object) -> BaseModel:
    """`config` as an instance of the mode's configuration class."""
    if isinstance(config, mode.Config):
        return config
    if not isinstance(config, Mapping):
        takes = f"a {mode.Config.__name__} or a mapping of its fields"
        raise ArgumentTypeError(describe("config", repr(config), takes))
    try:
        return mode.Config(**config)
    except ValidationError as error:
        raise ConfigError(f"config of mode {mode.name!r}: {error}") from error


def check_model(model: object) -> None:
    """Raises ArgumentTypeError unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(describe("model", repr(model), "a torch.nn.Module"))


def check_eval_mode(model: nn.Module) -> None:
    """Raises ArgumentError where a part of the model is in training mode."""
    if any(module.training for module in model.modules()):
        remedy = "Call model.eval() first."
        raise ArgumentError(describe("model", "one in training mode", "one in eval mode", remedy))

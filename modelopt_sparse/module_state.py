"""What each sparse module does, as plain data, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from torch import nn

from modelopt_sparse.config import Resolved
from modelopt_sparse.config.explain import explained
from modelopt_sparse.errors import ConfigError, StateError, describe, shown
from modelopt_sparse.methods.base import SparseMethodConfig
from modelopt_sparse.methods.registry import sparse_method
from modelopt_sparse.module import SparseAttentionModule

DecisionTiles = dict[str, list[int]]


def sparse_modules(model: nn.Module) -> Iterator[tuple[str, SparseAttentionModule]]:
    """The sparse attention modules of `model` with their dotted names."""
    for name, module in model.named_modules():
        if isinstance(module, SparseAttentionModule):
            yield name, module


def module_states(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By module name: ``enable``, the method's fields, and the decision tiles that its plan has."""
    return {
        name: {
            "enable": module.enabled,
            "fields": module.method.config.model_dump(mode="json"),
            "decision_tiles": decision_tiles(module),
        }
        for name, module in sparse_modules(model)
    }


def resolved_states(
    states: object, known: Mapping[str, Any]
) -> tuple[dict[str, Resolved], dict[str, Any]]:
    """`module_states` read back: what each module shall do, and the decision tiles it had.

    Args:
        known: the attention modules of the model, by name.
    Raises:
        StateError: not such a description, or of modules that the model doesn't have.
    """
    if not isinstance(states, Mapping):
        raise StateError(describe("modules", shown(states), "a mapping from module names"))
    unknown = set(states) - set(known)
    if unknown:
        takes = f"attention modules of this model: {', '.join(list(known)[:20])}"
        raise StateError(describe("modules", shown(unknown), takes))
    resolved: dict[str, Resolved] = {}
    tiles: dict[str, Any] = {}
    for name, state in states.items():
        place = f"modules[{name!r}]"
        if not isinstance(state, Mapping) or set(state) != {"enable", "fields", "decision_tiles"}:
            takes = "a mapping with 'enable', 'fields' and 'decision_tiles'"
            raise StateError(describe(place, shown(state), takes))
        if not isinstance(state["enable"], bool):
            raise StateError(describe(f"{place}.enable", shown(state["enable"]), "true or false"))
        resolved[name] = Resolved(_method_config(state["fields"], place), state["enable"])
        tiles[name] = state["decision_tiles"]
    return resolved, tiles


def _method_config(fields: object, place: str) -> SparseMethodConfig:
    if not isinstance(fields, Mapping):
        raise StateError(describe(f"{place}.fields", shown(fields), "a mapping"))
    try:
        return sparse_method(fields.get("method")).Config.model_validate(fields)
    except ValidationError as error:
        raise StateError(str(explained(error, f"{place}.fields"))) from None
    except ConfigError as error:
        raise StateError(f"{place}.fields: {error}") from None


def check_decision_tiles(model: nn.Module, tiles: Mapping[str, Any]) -> None:
    """Raises StateError where a module now decides on other tiles than it did: results would differ."""
    for name, module in sparse_modules(model):
        now = decision_tiles(module)
        if now != tiles[name]:
            place = f"modules[{name!r}].decision_tiles"
            raise StateError(describe(place, shown(tiles[name]), f"{now}, as this version decides"))


def decision_tiles(module: SparseAttentionModule) -> DecisionTiles:
    """The tile that is decided on, for each phase that skips.

    ``prefill``: [rows, keys]. ``decode``: [keys of a segment, keys of a tile].
    """
    plan = module.method.plan()
    tiles = {}
    if plan.skip is not None:
        tiles["prefill"] = [plan.skip.block_rows, plan.skip.block_keys]
    if plan.skip_decode is not None:
        tiles["decode"] = [plan.skip_decode.segment_keys, plan.skip_decode.block_keys]
    return tiles

"""Checks rules before any model is there, and makes frozen data of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from pydantic import ValidationError

from modelopt_sparse.errors import ConfigError, describe, shown, shown_key
from modelopt_sparse.methods.base import SparseMethodConfig, nearest
from modelopt_sparse.methods.registry import sparse_method, sparse_methods
from modelopt_sparse.patterns import check_pattern, expand, pattern_name

from .explain import explained, placed
from .rules import DEFAULT, Rule, Rules

MAX_RULES = 4096
"""A configuration has so many rules at most."""

MAX_GLOBS = 2**14
"""So many globs their patterns may stand for together: each is compiled and compared with each module."""

_RULE_TAKES = "a mapping with 'method', 'enable' and the method's fields, or a method's config"


def parse_rules(given: object) -> Rules:
    """The rules of a mapping from patterns to mappings or method configurations.

    Raises:
        ConfigError: anything in it isn't taken; the message names the pattern, the field, what it
            got, what it takes.
    """
    if isinstance(given, Rules):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(describe("sparse_cfg", shown(given), "a mapping from patterns to rules"))
    if len(given) > MAX_RULES:
        raise ConfigError(describe("sparse_cfg", f"{len(given)} rules", f"at most {MAX_RULES}"))
    globs = 0
    for pattern, raw in given.items():
        _check_key(pattern, raw)
        globs += len(expand(pattern)) if isinstance(pattern, str) else 1
        if globs > MAX_GLOBS:
            got = f"patterns with more than {MAX_GLOBS} expansions together"
            raise ConfigError(describe("sparse_cfg", got, "fewer", "Use wildcards."))
    raw_rules = {pattern: _plain(raw, _place(pattern)) for pattern, raw in given.items()}
    named = _named_methods(raw_rules)
    rules = [_parse_rule(pattern, raw, named) for pattern, raw in raw_rules.items()]
    if not named and any(rule.enable for rule in rules):
        raise ConfigError(describe("enable", "True, but no rule names a method", name_a_method()))
    # The sort is stable: the others keep their order.
    return Rules(tuple(sorted(rules, key=lambda rule: rule.pattern != DEFAULT)))


def name_a_method() -> str:
    """What a rule without a method is told to do."""
    return f"'method' too, one of {sorted(sparse_methods())}"


def own_names(keys: Iterable[str]) -> set[str]:
    """The names of the fields that `keys` may mean: themselves, and what they are aliases of."""
    configs = [method.Config for method in sparse_methods().values()]
    return {config.aliases.get(key, key) for key in keys for config in configs}


def _check_key(pattern: object, raw: object) -> None:
    keys = {"method", "enable"}.union(*(m.Config.model_fields for m in sparse_methods().values()))
    if isinstance(pattern, str) and pattern in keys and not isinstance(raw, Mapping):
        remedy = f"Put it in a rule: {{'*': {{{pattern!r}: ...}}}}."
        raise ConfigError(describe("sparse_cfg", repr(pattern), "patterns", remedy))
    try:
        check_pattern(pattern)
    except ConfigError as error:
        raise ConfigError(f"sparse_cfg: {error}") from None


def _plain(raw: object, place: str) -> Mapping[Any, Any]:
    if isinstance(raw, Mapping):
        return raw
    if not isinstance(raw, SparseMethodConfig):
        raise ConfigError(describe(place, shown(raw), _RULE_TAKES))
    registered = sparse_methods().get(raw.method)
    if registered is None or registered.Config is not type(raw):
        got = f"a {type(raw).__name__}"
        raise ConfigError(describe(place, got, "the configuration of a registered method"))
    return {name: getattr(raw, name) for name in type(raw).model_fields}


def _named_methods(rules: Mapping[Any, Mapping[Any, Any]]) -> list[type[SparseMethodConfig]]:
    names = [rule["method"] for rule in rules.values() if isinstance(rule.get("method"), str)]
    known = sparse_methods()
    return [known[name].Config for name in dict.fromkeys(names) if name in known]


def _parse_rule(
    pattern: Any, raw: Mapping[Any, Any], named: Sequence[type[SparseMethodConfig]]
) -> Rule:
    place = _place(pattern)
    fields = {key: value for key, value in raw.items() if key not in ("method", "enable")}
    enable = raw.get("enable")
    if "enable" in raw and not isinstance(enable, bool):
        raise ConfigError(describe(f"{place}.enable", shown(enable), "true or false"))
    try:
        if "method" in raw:
            checked = _checked_together(sparse_method(raw["method"]).Config, fields)
        else:
            checked = _checked_one_by_one(named, fields)
    except ValidationError as error:
        raise explained(error, place) from None
    except ConfigError as error:
        raise placed(error, place) from None
    # A field of another package's method may hold what its author can still change.
    fields_kept = tuple(sorted(deepcopy(checked).items()))
    return Rule(pattern, raw.get("method"), enable, fields_kept)


def _checked_together(
    config: type[SparseMethodConfig], fields: Mapping[Any, Any]
) -> dict[str, Any]:
    for key in fields:
        _check_not_misspelt(key, [config])
    names = config.canonical(fields)
    checked = config.model_validate(names)
    return {name: getattr(checked, name) for name in names}


def _checked_one_by_one(
    named: Sequence[type[SparseMethodConfig]], fields: Mapping[Any, Any]
) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for key, value in fields.items():
        name, checked_value = _checked_by_any(named, key, value)
        if name in checked:
            raise ConfigError(f"{name}: given twice, once as an alias; takes one of the names.")
        checked[name] = checked_value
    return checked


def _checked_by_any(
    named: Sequence[type[SparseMethodConfig]], key: Any, value: object
) -> tuple[str, Any]:
    """The field's own name and its value, as the first named method that takes them keeps them."""
    _check_not_misspelt(key, named)
    if not named:
        raise ConfigError(describe(str(key), "no method that it belongs to", name_a_method()))
    refusals: list[ValidationError] = []
    unknown: list[ConfigError] = []
    for config in named:
        try:
            (name,) = config.canonical({key: value})
            return name, config.check_field(name, value)
        except ValidationError as error:
            refusals.append(error)
        except ConfigError as error:
            unknown.append(error)
    # A method that has the field says what is wrong; the others only that they don't know it.
    raise next(iter(refusals or unknown))


def _check_not_misspelt(key: Any, configs: Sequence[type[SparseMethodConfig]]) -> None:
    """Keys that aren't the method's: what they are near to may be a key that every rule has."""
    known = {name for c in configs for name in (*c.model_fields, *c.aliases, *c.abandoned)}
    if key not in known:
        near = nearest(key, [*sorted(known), "enable", "method"])
        if near in ("enable", "method"):
            raise ConfigError(f"{shown_key(key)}: not a key of a rule. Did you mean {near}?")


def _place(pattern: object) -> str:
    return f"sparse_cfg[{pattern_name(pattern)}]"

"""Reads and writes configuration files: JSON or YAML, by suffix."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from modelopt_sparse.errors import ConfigError, describe

MAX_BYTES = 2**20
"""A configuration file is at most this long."""

_TAKES = "a file that ends in .json, .yaml or .yml"


def read_mapping(path: Path, max_bytes: int = MAX_BYTES) -> dict[Any, Any]:
    """The mapping that a file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: another suffix, more than `max_bytes`, malformed, a key twice, or not a
            mapping.
    """
    kind = _kind(path)
    if path.is_dir():
        raise ConfigError(describe("path", f"the folder {str(path)!r}", "a file"))
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ConfigError(describe(str(path), "a larger file", f"at most {max_bytes} bytes"))
    try:
        text = content.decode("utf-8-sig")
        data = _read_json(text) if kind == "JSON" else yaml.load(text, Loader=_OnceLoader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        remedy = "" if kind == "JSON" else "Quote patterns that begin with * or {."
        problem = " ".join(str(error).split())[:300]
        raise ConfigError(describe(str(path), problem, f"well-formed {kind}", remedy)) from None
    if not isinstance(data, dict):
        raise ConfigError(describe(str(path), f"a {type(data).__name__}", "a mapping"))
    return data


def write_mapping(path: Path, data: dict[str, Any]) -> None:
    """Writes plain data, in its order, so that `read_mapping` gives it back.

    Raises:
        ConfigError: the suffix is another.
    """
    if _kind(path) == "JSON":
        text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    else:
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def _kind(path: Path) -> str:
    kinds = {".json": "JSON", ".yaml": "YAML", ".yml": "YAML"}
    if path.suffix.lower() not in kinds:
        raise ConfigError(describe("path", repr(str(path)), _TAKES))
    return kinds[path.suffix.lower()]


def _read_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(describe("key", f"{key!r} twice", "each key once"))
        found[key] = value
    return found


class _OnceLoader(yaml.SafeLoader):
    """Plain YAML data, where a key that a mapping has twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        # Merge keys (<<) may be overridden on purpose, and are not resolved yet here.
        seen = set()
        for key_node, _ in node.value:
            key = (
                key_node.tag,
                key_node.value if isinstance(key_node.value, str) else id(key_node),
            )
            if key in seen:
                raise ConfigError(describe("key", f"{key_node.value!r} twice", "each key once"))
            seen.add(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping

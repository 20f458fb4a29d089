"""Reads and writes configuration files: JSON or YAML, by suffix."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from modelopt_sparse.errors import ConfigError, describe
from modelopt_sparse.files import parse_json, read_bytes, written_whole

MAX_BYTES = 2**20
"""A configuration file is at most this long."""

MAX_YAML_BYTES = 2**17
"""So long, if it is YAML, which is a hundred times slower to read."""

MAX_KEYS = 10_000
"""A YAML mapping has so many keys at most: merges of merges of a short file could have millions."""

_TAKES = "a file that ends in .json, .yaml or .yml"


def read_mapping(path: Path, max_bytes: int = MAX_BYTES) -> dict[Any, Any]:
    """The mapping that a file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: another suffix, more than `max_bytes` or for YAML `MAX_YAML_BYTES`, malformed, a key
            twice, or not a mapping.
    """
    kind = _kind(path)
    max_bytes = max_bytes if kind == "JSON" else min(max_bytes, MAX_YAML_BYTES)
    content = read_bytes(path, max_bytes, ConfigError)
    try:
        data = parse_json(content) if kind == "JSON" else _parse_yaml(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    # Of a malformed number or date, PyYAML raises whatever its code runs into.
    except Exception as error:
        remedy = "" if kind == "JSON" else "Quote patterns that begin with * or {."
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(describe(str(path), problem, f"well-formed {kind}", remedy)) from None
    if not isinstance(data, dict):
        raise ConfigError(describe(str(path), f"a {type(data).__name__}", "a mapping"))
    return data


def write_mapping(path: Path, data: dict[str, Any]) -> None:
    """Writes plain data, in its order, so that `read_mapping` gives it back; whole or not at all.

    Raises:
        ConfigError: the suffix is another, or it is more than may be read.
    """
    kind = _kind(path)
    if kind == "JSON":
        text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    else:
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    content = text.encode()
    most = MAX_BYTES if kind == "JSON" else MAX_YAML_BYTES
    if len(content) > most:
        remedy = "" if kind == "JSON" else "Write a .json file."
        got = f"{len(content)} bytes of {kind}"
        raise ConfigError(describe(str(path), got, f"at most {most}", remedy))
    with written_whole(path) as new:
        new.write_bytes(content)


def _kind(path: Path) -> str:
    kinds = {".json": "JSON", ".yaml": "YAML", ".yml": "YAML"}
    if path.suffix.lower() not in kinds:
        raise ConfigError(describe("path", repr(str(path)), _TAKES))
    return kinds[path.suffix.lower()]


def _parse_yaml(content: bytes) -> Any:
    return yaml.load(content.decode("utf-8-sig"), Loader=_OnceLoader)


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
                raise ConfigError(
                    describe("key", f"{key_node.value!r:.100} twice", "each key once")
                )
            seen.add(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_KEYS:
            raise ConfigError(
                describe("a mapping", "more keys", f"at most {MAX_KEYS}, merged ones too")
            )

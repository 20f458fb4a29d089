"""Turns what pydantic says about a value into this package's one message template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from modelopt_sparse.errors import ConfigError, describe, shown

MAX_LINES = 10
"""An error lists so many things that are wrong at most."""


def explained(error: ValidationError, place: str) -> ConfigError:
    """One `ConfigError` that names each field that is wrong, its value and what is taken.

    Args:
        place: where the fields are, for instance ``sparse_cfg['*attn*']``; empty at the top.
    """
    lines: list[Any] = error.errors(include_url=False)
    said = " ".join(_line(line, place) for line in lines[:MAX_LINES])
    more = len(lines) - MAX_LINES
    return ConfigError(f"{said} And {more} more." if more > 0 else said)


def placed(error: ConfigError, place: str) -> ConfigError:
    """The same error, with where it happened put before it."""
    return ConfigError(f"{place}.{error}" if place else str(error))


def _line(line: dict[str, Any], place: str) -> str:
    cause = line.get("ctx", {}).get("error")
    name = _path(([place] if place else []) + list(line["loc"]))
    if cause is not None:
        # A validator has named the field itself.
        return f"{name}.{cause}" if name else str(cause)
    if line["type"] == "missing":
        return describe(name, "nothing", "a value")
    return describe(name, shown(line["input"]), line["msg"].removeprefix("Input should be "))


def _path(parts: Sequence[str | int]) -> str:
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path

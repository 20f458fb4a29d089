"""Exception classes. Every message says what was got, what is taken and, where it helps, what to do."""

from __future__ import annotations

import reprlib


class SparseAttentionError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigError(SparseAttentionError, ValueError):
    """A configuration, pattern or preset is not valid."""


class ArgumentError(SparseAttentionError, ValueError):
    """A function argument has a value, shape, dtype or device that is not taken."""


class ArgumentTypeError(SparseAttentionError, TypeError):
    """A function argument has a type that is not taken."""


class UnsupportedCall(SparseAttentionError, NotImplementedError):
    """A valid request that is not offered here. Nothing falls back silently."""


class UnsupportedModel(SparseAttentionError, NotImplementedError):
    """A model whose attention cannot be made sparse."""


class StateError(SparseAttentionError, ValueError):
    """A saved state does not fit the model, the package version, or is not a state at all."""


def describe(name: str, got: object, takes: str, remedy: str = "") -> str:
    """The one message template: ``name: got X; takes Y. Remedy.``"""
    return f"{name}: got {got}; takes {takes}." + (f" {remedy}" if remedy else "")


def shown(value: object) -> str:
    """A repr that stays short, however large or deeply nested the value is."""
    short = reprlib.Repr()
    short.maxlevel = 3
    short.maxlist = short.maxtuple = short.maxset = short.maxdict = 4
    short.maxstring = short.maxother = short.maxlong = 60
    try:
        text = short.repr(value)
    except (ValueError, RecursionError):  # an int of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 200 else text[:200] + "..."


def shown_key(key: object) -> str:
    """A key as messages name it: short, and printable though YAML may have halves of characters."""
    return str(key)[:100].encode(errors="backslashreplace").decode()

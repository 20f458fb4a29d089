"""Types of configuration fields that several methods share. Values become plain float and int.

Numeric strings are taken on purpose: YAML reads ``1e-3`` as one. A bool is never a number.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from numbers import Real
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

# Token counts reach the kernels as int32.
MAX_TOKENS = 2**31 - 1
MAX_HEADS = 2**16

_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d{1,20}", re.ASCII)


def not_taken(kind: str, takes: str) -> PydanticCustomError:
    """A pydantic error of type `kind` in pydantic's own wording: ``Input should be <takes>``."""
    return PydanticCustomError(kind, "Input should be {takes}", {"takes": takes})


def fraction_or_none(value: Any) -> float | None:
    """A lambda as a float, or None."""
    return None if value is None else _checked_fraction(value, "a fraction from 0 to 1, or None")


def fraction(value: Any) -> float:
    """A lambda as a float."""
    return _checked_fraction(value, "a fraction from 0 to 1")


def _checked_fraction(value: object, takes: str) -> float:
    number = _as_float(value)
    # NaN fails every comparison, so it lands here too.
    if number is None or not 0.0 <= number <= 1.0:
        raise not_taken("fraction", takes)
    return abs(number)  # -0.0 is 0.0


def _as_float(value: object) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return float(value) if _DECIMAL.fullmatch(value.strip()) else None
    if not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _as_int(value: object) -> int | None:
    if isinstance(value, str):
        return int(value) if _INTEGER.fullmatch(value.strip()) else None
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    number = _as_float(value)
    return int(number) if number is not None and number.is_integer() else None


def whole_number(low: int, high: int) -> BeforeValidator:
    """Takes the integers from `low` to `high`, also spelt as strings; never a bool."""
    takes = f"an integer from {low} to {high}"
    return BeforeValidator(_integer_that(lambda number: low <= number <= high, takes))


def one_of(*choices: int) -> BeforeValidator:
    """Takes one of these integers, also spelt as a string; never a bool."""
    takes = f"one of {', '.join(map(str, choices))}"
    return BeforeValidator(_integer_that(lambda number: number in choices, takes))


def _integer_that(holds: Callable[[int], bool], takes: str) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        number = _as_int(value)
        if number is None or not holds(number):
            raise not_taken("whole_number", takes)
        return number

    return check


Tokens = Annotated[int, whole_number(0, MAX_TOKENS)]
"""A count of tokens: 0 <= value <= `MAX_TOKENS`."""

TileSize = Annotated[int, one_of(16, 32, 64, 128)]
"""Rows or keys of a decision tile: 16, 32, 64 or 128."""

AUTO_MIN_CONTEXT = 8192
"""What "auto" stands for: the context from which skipping beat the fastest dense kernel beside it, as
`modelopt_sparse.bench` measured on an H200."""


def _context(value: Any) -> Any:
    takes = f'"auto", or an integer from 0 to {MAX_TOKENS}'
    if isinstance(value, str) and value == "auto":
        return value
    number = _as_int(value)
    if number is None or not 0 <= number <= MAX_TOKENS:
        raise not_taken("context", takes)
    return number


MinContext = Annotated[int | Literal["auto"], BeforeValidator(_context)]
"""A count of tokens below which sequences are dense, or "auto": `AUTO_MIN_CONTEXT`."""


def least_context(value: int | Literal["auto"]) -> int:
    """The number that a `MinContext` stands for."""
    return AUTO_MIN_CONTEXT if value == "auto" else value


OptionalHeads = Annotated[int, whole_number(1, MAX_HEADS)] | None
"""A count of heads from 1 to `MAX_HEADS`, or None."""

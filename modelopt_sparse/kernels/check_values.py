"""Rules on single arguments: a tensor, a number, a truth."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from modelopt_sparse.errors import ArgumentError, ArgumentTypeError, describe

from .thresholds import as_float


def is_readable(x: Tensor) -> bool:
    """Whether values can be looked at without waiting for a GPU, or splitting a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_tensor(
    name: str,
    value: object,
    device: torch.device,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
    floating: bool = False,
) -> None:
    """`value` is a tensor of this shape (-1: any) and dtype on this device, that of q."""
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(describe(name, type(value).__name__, "a tensor"))
    found = value.shape
    if found != shape and (
        len(found) != len(shape)
        or any(want not in (-1, got) for got, want in zip(found, shape, strict=True))
    ):
        raise ArgumentError(describe(name, f"shape {tuple(value.shape)}", f"shape {list(shape)}"))
    if (dtype is not None and value.dtype != dtype) or (floating and not value.is_floating_point()):
        raise ArgumentError(describe(name, str(value.dtype), str(dtype or "a floating dtype")))
    if value.device != device:
        raise ArgumentError(describe(name, str(value.device), f"{device}, as q"))


def check_bool(name: str, value: object) -> None:
    """`value` is True or False."""
    if not isinstance(value, bool):
        raise ArgumentTypeError(describe(name, repr(value), "True or False"))


def check_int(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """`value` is an int (no bool) within the limits."""
    # Which type it is costs less to ask than whether it is a number, and stands before every launch.
    is_int = type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))
    number = int(value) if is_int else 0
    if is_int and (least is None or number >= least) and (most is None or number <= most):
        return number
    low, high = "any" if least is None else least, "any" if most is None else most
    takes = "an int" if least is most is None else f"an int from {low} to {high}"
    if not is_int:
        raise ArgumentTypeError(describe(name, repr(value), takes))
    raise ArgumentError(describe(name, number, takes))


def check_number(name: str, value: Any) -> float:
    """`value` is a finite number (no bool)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(describe(name, repr(value), "a finite number"))
    number = as_float(value)
    if not math.isfinite(number):
        raise ArgumentError(describe(name, value, "a finite number"))
    return number

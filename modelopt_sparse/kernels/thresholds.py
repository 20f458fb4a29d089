"""The skip threshold lambda, from what a caller gives to the log2 that a kernel compares with."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from modelopt_sparse.errors import ArgumentError, ArgumentTypeError, describe

_TAKES = "None, or a fraction: 0 (dense) or a number in (0, 1]"


def as_float(value: Real | float) -> float:
    """The number as a float; infinite where it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_fraction(name: str, value: object) -> float:
    """A lambda given as a number: finite and in [0, 1]. ``-0.0`` becomes ``0.0``."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise ArgumentTypeError(describe(name, repr(value), _TAKES))
    number = as_float(value)
    if not 0.0 <= number <= 1.0:
        raise ArgumentError(describe(name, repr(value), _TAKES))
    return number or 0.0


def check_factor(name: str, value: object) -> float:
    """A scale factor: a finite number from 0 on."""
    takes = "None, or a finite number from 0 on"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(describe(name, repr(value), takes))
    number = as_float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ArgumentError(describe(name, repr(value), takes))
    return number or 0.0


def check_threshold(name: str, value: Tensor, batch: int, heads: int, device: torch.device) -> None:
    """A lambda given as a tensor: of the right dtype, device and shape.

    Its values stay unread, so that no call waits for the device: `log2_threshold` clamps.
    """
    takes = f"float32 that broadcasts to [{batch}, {heads}] on {device}"
    if value.dtype != torch.float32 or value.device != device:
        raise ArgumentError(describe(name, f"{value.dtype} on {value.device}", takes))
    sizes = (1,) * (2 - value.ndim) + tuple(value.shape)
    if len(sizes) != 2 or sizes[0] not in (1, batch) or sizes[1] not in (1, heads):
        raise ArgumentError(describe(name, f"shape {tuple(value.shape)}", takes))


def log2_threshold(
    value: float | Tensor | None, batch: int, heads: int, device: torch.device
) -> Tensor:
    """log2(lambda) as fp32 [batch, heads]: computed in float64 and rounded once.

    A tensor is clamped to [0, 1]. None and 0 give -inf and NaN stays NaN; all keep every tile.
    """
    if isinstance(value, Tensor):
        clamped = value.double().clamp(0.0, 1.0)
        return clamped.log2().float().expand(batch, heads)
    log2 = math.log2(value) if value else -math.inf
    return torch.full((batch, heads), log2, dtype=torch.float32, device=device)

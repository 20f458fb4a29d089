"""What the launches of both passes need: the right device, a clear error, zeros where no kernel writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from modelopt_sparse.errors import UnsupportedCall, describe

from . import arguments
from .check import Call
from .launch import Launch, block_dim
from .programs.clear import clear_kernel


class launching:
    """Launches go to the tensors' device, not to the current one, and say so if they don't fit there.

    Raises:
        UnsupportedCall: a kernel needs more shared memory or registers than the GPU has.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        # It ships no types. A tensor on a CPU changes nothing.
        self._device: Any = torch.cuda.device_of(call.q)  # type: ignore[no-untyped-call]

    def __enter__(self) -> None:
        self._device.__enter__()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._device.__exit__(kind, error, trace)
        if isinstance(error, OutOfResources):
            q, v = self._call.q, self._call.v
            got = f"head dims {q.shape[-1]} and {v.shape[-1]} in {q.dtype}: {error}"
            remedy = "Use smaller decision tiles, or attention_reference (backend 'pytorch')."
            takes = "what fits the GPU"
            raise UnsupportedCall(describe("this call", got, takes, remedy)) from error


def launch_first_that_fits(launches: Iterable[Launch], run: Callable[[Launch], None]) -> None:
    """Runs a kernel as the first of some launches for which the GPU has what they need."""
    refused = None
    for launch in launches:
        try:
            run(launch)
            return
        except OutOfResources as error:
            refused = error
    assert refused is not None
    raise refused


def clear_unowned(
    x: Tensor,
    start: Tensor,
    length: Tensor,
    lse: Tensor | None = None,
    y: Tensor | None = None,
    counts: tuple[Tensor | None, Tensor | None] = (None, None),
    shares: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """Writes 0 (and an lse of -inf) to the tokens that no sequence owns; kernels write all others.

    Args:
        x, y: [tokens, heads, dim], each with a dim of its own. lse: [tokens, heads].
        start, length: int32 [B], the tokens of each sequence.
        counts, shares: int64, and fp32 [tokens, heads], all of which become 0.
    """
    tokens, heads, dim = x.shape
    dim_y = dim if y is None else y.shape[-1]
    if tokens:
        clear_kernel[(-(-tokens // 128),)](
            x, arguments.strides(x), lse, y, None if y is None else arguments.strides(y),
            start, length, start.shape[0], tokens, heads,
            counts[0], _size(counts[0]), counts[1], _size(counts[1]), *shares,
            dim, block_dim(dim), dim_y, block_dim(dim_y),
        )  # fmt: skip


def _size(x: Tensor | None) -> int:
    return 0 if x is None else x.numel()

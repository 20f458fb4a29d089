"""Attention kernels that are packages of their own, beside ours where they are installed. One sequence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from .baselines import Peer, Unavailable
from .inputs import Inputs

FLASH_3, FLASH_ATTN, FLASH_SPARSE = "FlashAttention-3", "flash-attn", "flash-sparse-attn"
FLASHINFER = "FlashInfer"
THEIR_THRESHOLD = 1.0
"""flash-sparse-attn's default: a tile falls where each row's share of it is below this over its keys."""


def dense_packages(inputs: Inputs) -> dict[str, Callable[[], Peer]]:
    """Those that compute dense attention, by name."""
    batched = tuple(x[None] for x in (inputs.q, inputs.k, inputs.v))
    packed = inputs.q, inputs.k, inputs.v
    causal, is_causal = {"causal": inputs.causal}, {"is_causal": inputs.causal}
    every = {
        FLASH_3: ("flash_attn_interface", "flash_attn_func", batched, causal),
        FLASH_ATTN: ("flash_attn", "flash_attn_func", batched, causal),
        FLASH_SPARSE: ("flash_sparse_attn", "flash_dense_attn_func", batched, is_causal),
        FLASHINFER: ("flashinfer", "single_prefill_with_kv_cache", packed, causal),
    }
    return {name: partial(_peer, *call) for name, call in every.items() if find_spec(call[0])}


def skipping_packages(inputs: Inputs) -> dict[str, Callable[[], Peer]]:
    """Those that skip tiles, each by its own rule."""
    module = "flash_sparse_attn"
    batched = tuple(x[None] for x in (inputs.q, inputs.k, inputs.v))
    options = {"is_causal": inputs.causal, "softmax_threshold": THEIR_THRESHOLD}
    call = partial(_peer, module, "flash_sparse_attn_func", batched, options, False)
    return {FLASH_SPARSE: call} if find_spec(module) else {}


def _peer(
    module: str,
    name: str,
    tensors: tuple[Tensor, ...],
    options: dict[str, Any],
    is_checked: bool = True,
) -> Peer:
    def run() -> Tensor:
        found = attend(*tensors, **options)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out[0] if out.dim() == 4 else out

    try:
        attend: Callable[..., Any] = getattr(import_module(module), name)
        run()
    except Exception as error:  # foreign code: whatever it raises is a reason
        raise Unavailable(f"{module}: {type(error).__name__}: {error}") from error
    if is_checked:
        return Peer(run, run)
    return Peer(run, None, "by its own rule, its result was not checked")

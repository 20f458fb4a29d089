"""Launches of the Hopper kernel for latents, and what it applies to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import arguments
from .boxes import gluon_box, layout_of
from .check import Call
from .launch import is_hopper, split_dim
from .results import Results
from .splits import Splits, merge
from .types import Phase

# Tiles of the kernel: rows, and keys.
_ROWS, _KEYS = 64, 64
# Of fewer rows at least half a program's would be empty; plain Triton's has as many as it needs.
_LEAST_ROWS = 33
_LATENT_CHANNELS = (256, 512)
_ROTARY_CHANNELS = 64


@dataclass(frozen=True)
class LatentVariant:
    """Compile-time constants of the kernel, as in `DecodeVariant`."""

    HEAD_DIM: int
    REST: int
    PAGE: int
    CAUSAL: bool
    ALL_DECODE: bool


def latent_refusals(call: Call, rows: int) -> Iterator[str]:
    """Why the Hopper kernel doesn't compute a call that decodes; nothing if it does.

    Args:
        rows: of all heads of a sequence.
    """
    q, k, v = call.q, call.k, call.v
    if not is_hopper(k.device):
        yield "the GPU isn't one of compute capability 9.0"
    if not has_values_in_keys(call) or k.shape[-2] != 1 or layout_of(v) is None:
        yield "keys that don't hold their values"
    elif v.shape[-1] not in _LATENT_CHANNELS or k.shape[-1] - v.shape[-1] != _ROTARY_CHANNELS:
        yield f"latents of {v.shape[-1]} and {k.shape[-1] - v.shape[-1]} channels"
    if call.block_tables is None or k.shape[1] % _KEYS:
        yield f"no pages of {_KEYS} tokens or a multiple"
    if k.dtype != q.dtype or k.dtype not in (torch.float16, torch.bfloat16):
        yield f"{q.dtype} queries and {k.dtype} keys"
    if rows < _LEAST_ROWS:
        yield f"{rows} rows of a sequence"
    if call.plan.skip_decode is not None:
        yield "tiles to skip"
    for name in ("mask", "bias", "bounds", "window", "softcap", "sinks"):
        if getattr(call, name) is not None:
            yield name


def launch_latent(call: Call, results: Results, max_q: int) -> None:
    """Computes the sequences of such a call."""
    from .hopper.latent import REGISTERS, WARPS, latent_kernel

    q, k, seqs, scale = call.q, call.k, call.seqs, call.scale
    heads, batch = q.shape[1], seqs.q_len.shape[0]
    latents, rotary = call.v, k[..., call.v.shape[-1] :]
    layout = layout_of(latents)
    assert layout is not None and call.block_tables is not None and scale is not None
    splits = Splits.of(call, max_q, least=1)
    blocks = -(-heads * max_q // _ROWS)
    table = call.block_tables[0]
    C = LatentVariant(
        latents.shape[-1], rotary.shape[-1], k.shape[1], call.causal, call.phase is Phase.DECODE
    )
    half = gluon_box(latents, layout, _KEYS, latents.shape[-1] // 2)
    rotary_box = gluon_box(rotary, layout, _KEYS, rotary.shape[-1])
    latent_kernel[(batch * splits.count * blocks,)](
        q, half, rotary_box, splits.sums, splits.out, *arguments.strides(q),
        table, table.stride(0), layout[1],
        *arguments.sequences(seqs)[:2], seqs.k_len, heads, blocks, max_q, splits.count,
        *splits.tiles(_KEYS), splits.entries, scale / math.log(2),
        C, num_warps=WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
    merge(call, results, splits, max_q)


def has_values_in_keys(call: Call) -> bool:
    """Whether values are the first channels of the keys, as in a cache of latents."""
    k, v = call.k, call.v
    if k.data_ptr() != v.data_ptr() or k.stride() != v.stride() or k.shape[:-1] != v.shape[:-1]:
        return False
    if call.block_tables is not None and call.block_tables[0] is not call.block_tables[1]:
        return False
    return bool(v.shape[-1] == split_dim(k.shape[-1])[0])

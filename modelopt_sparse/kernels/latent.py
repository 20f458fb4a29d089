"""Launches of the Hopper kernel for latents, and what it applies to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from . import arguments
from .boxes import layout_of, shape_of
from .check import Call
from .launch import split_dim
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


def latent_applies(call: Call, rows: int) -> bool:
    """Whether the Hopper kernel computes a call that decodes: dense attention to pages of latents.

    Args:
        rows: of all heads of a sequence.
    """
    k = call.k
    extras = call.mask, call.bias, call.bounds, call.window, call.softcap, call.sinks
    return (
        rows >= _LEAST_ROWS
        and call.plan.skip_decode is None
        and all(x is None for x in extras)
        and has_values_in_keys(call)
        and call.block_tables is not None
        and k.shape[1] % _KEYS == 0
        and k.shape[2] == 1
        and k.dtype == call.q.dtype
        and k.dtype in (torch.float16, torch.bfloat16)
        and call.v.shape[-1] in _LATENT_CHANNELS
        and k.shape[-1] - call.v.shape[-1] == _ROTARY_CHANNELS
        and layout_of(call.v) is not None
        and _is_hopper(k.device)
    )


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
    half = _box(latents, latents.shape[-1] // 2)
    latent_kernel[(batch * splits.count * blocks,)](
        q, half, _box(rotary, rotary.shape[-1]), splits.sums, splits.out, *arguments.strides(q),
        table, table.stride(0), layout[1],
        *arguments.sequences(seqs)[:2], seqs.k_len, heads, blocks, max_q, splits.count,
        *splits.tiles(_KEYS), splits.entries, scale / math.log(2),
        C, num_warps=WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
    merge(call, results, splits, max_q)


@lru_cache
def _is_hopper(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def _box(x: torch.Tensor, channels: int) -> object:
    """Descriptor of the rows of pages [pages, page_size, 1, all channels], in tiles of keys and channels."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = layout_of(x)
    assert layout is not None
    shared = gl.NVMMASharedLayout(128, 8 * x.element_size(), 2)
    return TensorDescriptor(x, shape_of(x, layout), [x.stride(-3), 1], [_KEYS, channels], shared)


def has_values_in_keys(call: Call) -> bool:
    """Whether values are the first channels of the keys, as in a cache of latents."""
    k, v = call.k, call.v
    if k.data_ptr() != v.data_ptr() or k.stride() != v.stride() or k.shape[:-1] != v.shape[:-1]:
        return False
    if call.block_tables is not None and call.block_tables[0] is not call.block_tables[1]:
        return False
    return bool(v.shape[-1] == split_dim(k.shape[-1])[0])

"""Partial results of the same rows, over keys that were cut into parts, made one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modelopt_sparse.errors import ArgumentError, describe


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What attention over all keys gives, from what it gave over each part of them.

    For keys in a shared prefix and in a suffix, on several devices, or in several calls. A call with sink
    logits counts them in its part: give them in one. Where tiles were skipped, lse leaves out what they
    held, and parts that lost more are weighed too little: use ``exact_normalizer=True`` there.

    Args:
        outs: of each part [..., Dv], any floating dtype.
        lses: of each part [...] fp32 or fp64, base 2; -inf in rows that see no key of the part.
    Returns:
        out [..., Dv] in the dtype of the first part, and lse [...], base 2; 0 and -inf in rows that see no
        key of any part.
    Raises:
        ArgumentError: the parts don't fit each other.
    Source: FlashInfer's cascade inference; Flash-Decoding.
    """
    if not outs or len(outs) != len(lses):
        takes = "as many lses as outs, and at least one"
        raise ArgumentError(describe("outs", f"{len(outs)} outs, {len(lses)} lses", takes))
    for name, parts, shape in (("outs", outs, outs[0].shape), ("lses", lses, outs[0].shape[:-1])):
        for part in parts:
            if part.shape != shape:
                got = f"shape {tuple(part.shape)}"
                raise ArgumentError(describe(name, got, f"shape {tuple(shape)}"))
    of_parts = torch.stack(list(lses))
    pivot = of_parts.amax(0)
    weights = torch.exp2(of_parts - torch.where(pivot == -torch.inf, 0.0, pivot))  # [parts, ...]
    total = weights.sum(0)
    weights = weights / torch.where(total == 0, 1.0, total)
    # By select: an out that belongs to no key may hold anything.
    out = torch.zeros_like(outs[0], dtype=weights.dtype)
    for part, weight in zip(outs, weights, strict=True):
        out += torch.where(weight[..., None] == 0, 0.0, part * weight[..., None])
    return out.to(outs[0].dtype), total.log2() + torch.where(pivot == -torch.inf, 0.0, pivot)

"""The splits of sequences that decode: their keys, what they come to, and the launch that adds them up."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import arguments
from .check import Call
from .programs.merge import merge_kernel
from .results import Results
from .types import Phase, SkipSoftmaxDecode

SHORT_SPLIT_KEYS, LONG_SPLIT_KEYS, LONG = 512, 2048, 8192
"""Keys of a split where nothing is skipped, in sequences of fewer keys than LONG, and in others.

Few fill a GPU; many cost less beside what begins and ends a program.
"""
# Channels of a merge program.
_CHANNELS = 32


@dataclass(frozen=True)
class MergeVariant:
    """Compile-time constants of the merge kernel, as in `Variant`.

    Args:
        CHANNELS: of a program, a power of two. ALL_DECODE: sequences of more than one row decode too.
    """

    HEAD_DIM_V: int
    CHANNELS: int
    HAS_SINKS: bool
    SKIP: bool
    EXACT: bool
    ALL_DECODE: bool


@dataclass(frozen=True, eq=False)
class Splits:
    """Splits of a call that decodes.

    A program computes one, so that bits depend on nothing but the sequence itself.

    Args:
        short, long: keys of a split in sequences of fewer keys than LONG, and in others.
        count: of a sequence, at most.
        entries: sequences x rows of a sequence x heads.
        sums, out: fp32 [count, entries, 4] and [count, entries, Dv], see `merge_kernel`; None for one split.
    """

    short: int
    long: int
    count: int
    entries: int
    sums: Tensor | None
    out: Tensor | None

    @classmethod
    def of(cls, call: Call, max_q: int, least: int = 2) -> Splits:
        """Of a call with at most so many rows a sequence. Sums are kept from `least` splits on."""
        q, max_k = call.q, call.seqs.max_k
        short, long = split_keys(call.plan.skip_decode)
        count = max(1, -(-min(max_k, LONG - 1) // short), -(-max_k // long))
        entries = call.seqs.q_len.shape[0] * max_q * q.shape[1]
        if count < least:
            return cls(short, long, count, entries, None, None)
        sums = torch.empty((count, entries, 4), dtype=torch.float32, device=q.device)
        shape = count, entries, call.v.shape[-1]
        out = torch.empty(shape, dtype=torch.float32, device=q.device)
        return cls(short, long, count, entries, sums, out)

    def tiles(self, block_keys: int) -> tuple[int, int, int]:
        """Tiles of a split in short and in long sequences, and the keys of a long one."""
        return self.short // block_keys, self.long // block_keys, LONG


def merge(call: Call, results: Results, splits: Splits, max_q: int) -> None:
    """Adds up the splits of all rows that decode."""
    seqs, skip, dim = call.seqs, call.plan.skip_decode, call.v.shape[-1]
    exact = skip is not None and skip.exact_normalizer
    all_decode = call.phase is Phase.DECODE
    C = MergeVariant(dim, _CHANNELS, call.sinks is not None, skip is not None, exact, all_decode)
    merge_kernel[(splits.entries, -(-dim // _CHANNELS))](
        splits.sums, splits.out, results.out, results.lse, arguments.strides(results.out),
        seqs.q_start, seqs.q_len, seqs.k_len, splits.entries, call.q.shape[1], max_q,
        splits.short, splits.long, LONG, call.sinks, call.v_scale, results.bound, results.dropped,
        C, num_warps=1,
    )  # fmt: skip


def split_keys(skip: SkipSoftmaxDecode | None) -> tuple[int, int]:
    """Keys of a split in short and in long sequences.

    Where tiles are skipped, whole segments, for each begins anew, and whole words of decisions.
    """
    if skip is None:
        return SHORT_SPLIT_KEYS, LONG_SPLIT_KEYS
    keys = skip.block_keys * math.lcm(skip.segment_keys // skip.block_keys, 32)
    return keys, keys

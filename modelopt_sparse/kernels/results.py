"""What the forward kernels write."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import first_bin
from .check import Call
from .device.bins import BINS
from .tiles import slot_count, word_count
from .types import Phase, SkipSoftmax, SkipSoftmaxDecode


class Results(NamedTuple):
    """Tensors that kernels write; those that a call has no use for are None.

    Args:
        out: [Tq, Hq, Dv]; lse: [Tq, Hq] fp32, base 2.
        prefill, decode: int64 [2 + padded count_thresholds + bins, Hq]: tiles of a phase that are visible,
            skipped, and that each further threshold would skip; and their histogram, where it is wanted.
        words, decode_words: decisions, as in `TileMap`.
        dropped, bound: [Tq, Hq] fp32, the dropped mass and its bound.
    """

    out: Tensor
    lse: Tensor
    prefill: Tensor | None
    decode: Tensor | None
    words: Tensor | None
    decode_words: Tensor | None
    dropped: Tensor | None
    bound: Tensor | None


def allocate(call: Call, keep_tiles: bool) -> Results:
    """The tensors of a checked call, in which anything may be but in words.

    Args:
        keep_tiles: whether decisions are wanted even without ``call.details``.
    """
    q, seqs, plan = call.q, call.seqs, call.plan
    (rows, heads), batch = q.shape[:2], seqs.q_len.shape[0]

    def words_of(n: int, keys: int) -> Tensor:
        shape = n, heads, word_count(seqs.max_k, keys)
        return torch.zeros(shape, dtype=torch.int32, device=q.device)

    def counts(skip: SkipSoftmax | SkipSoftmaxDecode | None) -> Tensor | None:
        if skip is None:
            return None
        shape = first_bin(skip) + BINS * skip.histogram, heads
        return q.new_empty(shape, dtype=torch.int64)

    skips = plan.skip is not None or plan.skip_decode is not None
    keep_tiles = keep_tiles or call.details
    words = decode_words = None
    if plan.skip is not None and keep_tiles:
        slots = slot_count(rows, batch, seqs.max_q, plan.skip.block_rows)
        words = words_of(slots, plan.skip.block_keys)
    if plan.skip_decode is not None and keep_tiles:
        decode_words = words_of(batch, plan.skip_decode.block_keys)
    may_prefill = call.phase is Phase.PREFILL or (call.phase is None and seqs.max_q > 1)
    may_decode = call.phase is not Phase.PREFILL
    lse = q.new_empty((rows, heads), dtype=torch.float32)
    return Results(
        out=q.new_empty((rows, heads, call.v.shape[-1])),
        lse=lse,
        prefill=counts(plan.skip) if may_prefill else None,
        decode=counts(plan.skip_decode) if may_decode else None,
        words=words,
        decode_words=decode_words,
        dropped=torch.empty_like(lse) if skips and call.details else None,
        bound=torch.empty_like(lse) if skips else None,
    )


def scratch(results: Results) -> Results:
    """For a pass that only counts: what isn't wanted of it goes where nobody looks."""
    return Results(
        out=torch.empty_like(results.out),
        lse=torch.empty_like(results.lse),
        prefill=results.prefill,
        decode=results.decode,
        words=results.words,
        decode_words=results.decode_words,
        dropped=None if results.dropped is None else torch.empty_like(results.lse),
        bound=None if results.bound is None else torch.empty_like(results.lse),
    )

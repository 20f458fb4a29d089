"""Attention of one block of query rows: scores, N:M, tile decisions, softmax, PV."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modelopt_sparse.kernels.types import SkipSoftmaxDecode

from .nm import nm_hidden
from .rules import Rules
from .sequence import LOG2_E, Sequence
from .skip import Decisions

# Blocks begin at multiples of this on the key position: whole tiles of any permitted size.
ALIGN = 128


@dataclass(frozen=True, eq=False)
class Block:
    """What R rows of a sequence gave.

    Args:
        rows: which rows of the sequence.
        out: [R, Hq, Dv]; lse: [R, Hq].
        dropped: [R, Hq], the share of the weight in skipped tiles; bound: at least that, from their
            maxima. None where nothing is skipped.
        decisions: under the threshold in force, then the counted; None where nothing is skipped or no key
            is visible.
        first_key: position of the block's first key.
    """

    rows: slice
    out: Tensor
    lse: Tensor
    dropped: Tensor | None = None
    bound: Tensor | None = None
    decisions: Decisions | None = None
    first_key: int = 0


def attend_block(sequence: Sequence, rules: Rules, rows: slice) -> Block:
    """Computes one row block. Under autograd its scores are recomputed in the backward pass."""
    skip = rules.skip
    keys = sequence.key_span(
        rows, skip.segment_keys if isinstance(skip, SkipSoftmaxDecode) else ALIGN
    )
    n_rows, heads = rows.stop - rows.start, sequence.q.shape[1]
    if keys.start == keys.stop:
        out = sequence.q.new_zeros(n_rows, heads, sequence.v.shape[-1])
        return Block(rows, out, out.new_full((n_rows, heads), -torch.inf))

    given = rules.kept_of_given(sequence, rows, keys)  # [Hq, R, T]

    def scores() -> Tensor:
        x = sequence.scores(rows, keys)
        if rules.nm is not None:
            positions = torch.arange(keys.start, keys.stop, device=x.device)
            x = x.masked_fill(nm_hidden(x, rules.nm, sequence.rows[rows], positions), -torch.inf)
        if given is not None:
            # What a tile left out holds may be above the rest, so it takes no part in the pivot.
            x = x.masked_fill(~given.repeat_interleave(rules.block_keys, -1), -torch.inf)
        return x

    decisions = known = None
    kept = given
    if skip is not None:
        with torch.no_grad():
            known = scores()
            decisions = rules.decide(known, sequence, rows)
            if skip.threshold is not None:
                tile = rules.row_tile(sequence, rows)
                stays = decisions.visible & ~decisions.skipped[0]
                kept = stays[:, tile - tile[0]]  # [Hq, R, T]
    exact = skip is not None and skip.exact_normalizer

    def softmax_pv(v: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        x = known if known is not None and not torch.is_grad_enabled() else scores()
        return _softmax_pv(x, kept, v, sequence.call.sinks, exact)

    v = sequence.v[:, keys]
    if torch.is_grad_enabled() and sequence.requires_grad():
        # The tiles kept are constants here: the gradient is that of what the forward did.
        known = None
        out, lse, dropped, bound = checkpoint(
            softmax_pv, v, use_reentrant=False, preserve_rng_state=False
        )
    else:
        with torch.no_grad():
            out, lse, dropped, bound = softmax_pv(v)
    return Block(rows, out, lse, dropped, bound, decisions, keys.start)


def _softmax_pv(
    x: Tensor, kept: Tensor | None, v: Tensor, sinks: Tensor | None, exact: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Softmax over the kept tiles, times V.

    Args:
        x: [Hq, R, N] log2 scores after N:M. kept: bool [Hq, R, T] or None. v: [Hk, N, Dv].
        exact: the normaliser sums what is not kept too.
    Returns:
        out [R, Hq, Dv]; lse [R, Hq] base 2; dropped and its bound [R, Hq], or None twice.
    """
    pivot = x.detach().amax(-1, keepdim=True)  # [Hq, R, 1]
    empty = pivot == -torch.inf
    sink = None if sinks is None else (sinks.to(x.dtype) * LOG2_E)[:, None, None]
    if sink is not None:
        pivot = torch.maximum(pivot, sink.detach())
    pivot = pivot.masked_fill(empty, 0.0)
    weights = (x - pivot).exp2_()  # [Hq, R, N], exactly 0 where hidden
    sink_weight = 0.0 if sink is None else torch.exp2(sink - pivot)
    dropped = bound = None
    if kept is None:
        total = weights.sum(-1, keepdim=True) + sink_weight
    else:
        block_keys = x.shape[-1] // kept.shape[-1]
        tiles = weights.view(*kept.shape, block_keys)
        sums = tiles.sum(-1)  # [Hq, R, T]
        whole = sums.sum(-1, keepdim=True) + sink_weight
        stays = sums.masked_fill(~kept, 0.0).sum(-1, keepdim=True) + sink_weight
        with torch.no_grad():
            lost = sums.masked_fill(kept, 0.0).sum(-1, keepdim=True)
            dropped = (lost / whole).masked_fill(empty, 0.0).squeeze(-1).T
            most = tiles.amax(-1).masked_fill(kept, 0.0).sum(-1, keepdim=True) * block_keys
            bound = (most / (most + stays)).masked_fill(most == 0, 0.0).squeeze(-1).T
        weights = tiles.masked_fill(~kept[..., None], 0.0).flatten(-2)
        total = whole if exact else stays
    total = total.masked_fill(empty, 1.0)
    heads, n_rows, n_keys = weights.shape
    grouped = weights.reshape(v.shape[0], -1, n_keys)  # [Hk, g * R, N]
    out = (_weighted_sum(grouped, v).view(heads, n_rows, -1) / total).masked_fill(empty, 0.0)
    lse = (total.log2() + pivot).masked_fill(empty, -torch.inf)
    return out.transpose(0, 1), lse.squeeze(-1).T, dropped, bound


def _weighted_sum(weights: Tensor, v: Tensor) -> Tensor:
    """weights @ v, where a value that is not finite reaches only the rows that give it weight."""
    finite = v.isfinite()
    if finite.all():
        return weights @ v
    out = weights @ v.masked_fill(~finite, 0.0)
    reached = (weights != 0).to(v.dtype) @ (~finite).to(v.dtype)
    return out.masked_fill(reached > 0, torch.nan)

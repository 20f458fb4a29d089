"""What two models' logits say of the same next tokens."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .batches import Batch

# Logits that are compared at a time: 32 MiB in float64, and a handful of such tensors live at once.
LOGITS = 2**22


class TokenScores(NamedTuple):
    """One number for each scored token, float64 [tokens], on the CPU.

    Args:
        dense_bits, sparse_bits: -log2 of the probability of the token that came.
        kl_bits: KL(dense || sparse), in bits.
        agrees: 1 where both have the same most likely token.
    """

    dense_bits: Tensor
    sparse_bits: Tensor
    kl_bits: Tensor
    agrees: Tensor


def token_scores(batch: Batch, dense: Tensor, sparse: Tensor) -> list[TokenScores]:
    """The scores of each sequence of a batch, from the logits [B, T, V] of both."""
    size = max(1, LOGITS // dense.shape[-1])
    found = []
    for ids, scored, ours, theirs in zip(batch.ids, batch.scored, dense, sparse, strict=True):
        pieces = [
            _scores(ours[at], theirs[at], ids.to(at.device)[at + 1])
            for at in scored.to(dense.device).nonzero()[:, 0].split(size)
        ]
        found.append(TokenScores(*torch.cat(pieces, 1).cpu()))
    return found


def _scores(dense: Tensor, sparse: Tensor, targets: Tensor) -> Tensor:
    """The fields of `TokenScores`, stacked, from logits [n, V] and the tokens [n] that came."""
    log_p, log_q = dense.double().log_softmax(-1), sparse.double().log_softmax(-1)
    # Tokens that a model rules out have a logit of -inf in both.
    divergence = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)
    came = targets.long()[:, None]
    nats = [-log_p.gather(1, came)[:, 0], -log_q.gather(1, came)[:, 0], divergence]
    agrees = (dense.argmax(-1) == sparse.argmax(-1)).double()
    return torch.stack([*(x / math.log(2) for x in nats), agrees])

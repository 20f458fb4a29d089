"""Many numbers made few: of tokens, with intervals, and of tiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from modelopt_sparse.stats import AttentionStats

from .intervals import clusters, mean_interval, share_interval
from .results import Estimate
from .tokens import TokenScores


def token_results(sequences: Sequence[TokenScores], confidence: float) -> dict[str, Any]:
    """The fields of a `Comparison` that follow from the tokens of each sequence."""
    groups = [TokenScores(*group.T) for group in clusters([torch.stack(s, 1) for s in sequences])]
    every = TokenScores(*(torch.cat(parts) for parts in zip(*sequences, strict=True)))
    tokens, same = len(every.agrees), int(every.agrees.sum())

    def estimate(values: Tensor, by_group: list[Tensor]) -> Estimate:
        return Estimate(value=values.mean().item(), interval=mean_interval(by_group, confidence))

    return {
        "tokens": tokens,
        "sequences": len(sequences),
        "clusters": len(groups),
        "confidence": confidence,
        "dense_bits": every.dense_bits.mean().item(),
        "sparse_bits": every.sparse_bits.mean().item(),
        "bits_difference": estimate(
            every.sparse_bits - every.dense_bits,
            [group.sparse_bits - group.dense_bits for group in groups],
        ),
        "agreement": Estimate(
            value=same / tokens, interval=share_interval(same, tokens, confidence)
        ),
        "kl_bits": estimate(every.kl_bits, [group.kl_bits for group in groups]),
    }


def sparsity(stats: Iterable[AttentionStats]) -> float | None:
    """Tiles skipped / visible of all modules and phases; None where none were counted."""
    counted = [
        phase.counts
        for module in stats
        for phase in (module.prefill, module.decode)
        if phase.counts is not None
    ]
    visible = sum(int(counts.visible.sum()) for counts in counted)
    skipped = sum(int(counts.skipped[0].sum()) for counts in counted)
    return skipped / visible if visible else None

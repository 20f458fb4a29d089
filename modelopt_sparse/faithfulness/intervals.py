"""Confidence intervals of means over tokens, which aren't independent, and of shares."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Interval = tuple[float, float]

# One sequence is cut into so many blocks, or into fewer, so that none is shorter than this.
BLOCKS, LEAST_TOKENS = 20, 16


def clusters(sequences: Sequence[Tensor]) -> list[Tensor]:
    """The groups of tokens that are taken for independent: the sequences; of a single one, blocks.

    Args:
        sequences: for each sequence what was measured of its tokens, [tokens, ...].
    Returns:
        The sequences, if there are several. Else 2 to 20 blocks of consecutive tokens, equal in length to
        a token and at least 16 long. Less than 32 tokens stay one group.
    """
    if len(sequences) > 1:
        return list(sequences)
    (values,) = sequences
    count = min(BLOCKS, len(values) // LEAST_TOKENS)
    return list(values.tensor_split(max(count, 1)))


def mean_interval(groups: Sequence[Tensor], confidence: float) -> Interval | None:
    """A Student's t interval of the mean over all tokens, from how much the groups' own means differ.

    The mean is a ratio, sum of totals over sum of sizes, and this is its linearised error. With groups of
    one size it is the t interval of their means.

    Args:
        groups: float64 [tokens] each, independent of one another.
        confidence: the share of such intervals that hold the true mean, as 0.95.
    Returns:
        Its ends; None for one group, which says nothing about how much groups differ.
    """
    # Half a second to import, which only who compares shall wait for.
    from scipy import stats

    count = len(groups)
    if count < 2:
        return None
    totals = torch.stack([group.sum() for group in groups])
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.float64)
    mean = totals.sum() / sizes.sum()
    residuals = totals - mean * sizes
    error = math.sqrt(count / (count - 1) * residuals.square().sum()) / sizes.sum()
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * float(error)
    return float(mean) - half, float(mean) + half


def share_interval(successes: int, trials: int, confidence: float) -> Interval:
    """Wilson's score interval of a share seen in independent trials."""
    from scipy import stats

    found = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def paired_interval(lost: int, gained: int, trials: int, confidence: float) -> Interval:
    """Of the difference of two shares of the same independent trials, first minus second.

    Wald's, with half a trial added to each of the four outcomes. Source: Agresti and Min, 2005.

    Args:
        lost: trials in which only the first succeeded. gained: in which only the second did.
    """
    from scipy import stats

    only_first, only_second, count = lost + 0.5, gained + 0.5, trials + 2.0
    mean = (only_first - only_second) / count
    error = math.sqrt((only_first + only_second) / count - mean**2) / math.sqrt(count)
    half = float(stats.norm.ppf((1 + confidence) / 2)) * error
    return max(mean - half, -1.0), min(mean + half, 1.0)

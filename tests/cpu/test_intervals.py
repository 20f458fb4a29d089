"""Confidence intervals beside known values, and beside how often they hold what they should."""

from __future__ import annotations

import pytest
import torch

from modelopt_sparse.faithfulness.intervals import (
    clusters,
    mean_interval,
    paired_interval,
    share_interval,
)


def test_of_groups_of_one_size_it_is_the_t_interval_of_their_means():
    groups = [torch.tensor([m - 0.5, m, m + 0.5], dtype=torch.float64) for m in (1, 2, 3, 4)]
    # 2.5, the standard error of four means sqrt(5 / 3 / 4), and t(0.975, 3) = 3.182446.
    half = 3.182446 * (5 / 3 / 4) ** 0.5
    assert mean_interval(groups, 0.95) == pytest.approx((2.5 - half, 2.5 + half), rel=1e-6)


def test_long_groups_weigh_more():
    groups = [torch.zeros(30, dtype=torch.float64), torch.ones(10, dtype=torch.float64)]
    low, high = mean_interval(groups, 0.9)
    # Mean 10 / 40; residuals -7.5 and 7.5; t(0.95, 1) = 6.313752.
    assert (low + high) / 2 == pytest.approx(0.25)
    assert (high - low) / 2 == pytest.approx(6.313752 * (2 * 2 * 7.5**2) ** 0.5 / 40, rel=1e-6)


def test_one_group_has_no_interval():
    assert mean_interval([torch.ones(500, dtype=torch.float64)], 0.95) is None


@pytest.mark.parametrize("tokens, sizes", [
    (1, {1}), (31, {31}), (32, {16}), (299, {16, 17}), (320, {16}), (2047, {102, 103}),
])  # fmt: skip
def test_one_sequence_is_cut_into_blocks_that_are_not_short(tokens, sizes):
    values = torch.arange(tokens)
    blocks = clusters([values])
    assert {len(block) for block in blocks} == sizes
    assert torch.equal(torch.cat(blocks), values)


def test_several_sequences_stay_whole():
    sequences = [torch.ones(5, 4), torch.ones(1000, 4)]
    assert all(a is b for a, b in zip(clusters(sequences), sequences, strict=True))


def test_neighbours_that_are_alike_widen_the_interval():
    generator = torch.Generator().manual_seed(0)

    def rates(alike: int) -> float:
        """How often the interval of 2000 numbers of mean 0, equal in runs, holds 0."""
        held = 0
        for _ in range(300):
            draws = torch.randn(2000 // alike, generator=generator, dtype=torch.float64)
            low, high = mean_interval(clusters([draws.repeat_interleave(alike)]), 0.95)
            held += low <= 0 <= high
        return held / 300

    assert 0.91 < rates(1) < 0.985
    assert 0.91 < rates(20) < 0.985


@pytest.mark.parametrize("successes, trials, interval", [
    (8, 10, (0.490162, 0.943318)), (0, 10, (0, 0.277533)), (100, 100, (0.963007, 1)),
])  # fmt: skip
def test_shares_have_wilsons_interval(successes, trials, interval):
    assert share_interval(successes, trials, 0.95) == pytest.approx(interval, abs=2e-6)


def test_a_paired_difference_is_that_of_the_trials_in_which_only_one_succeeded():
    # (12.5 - 4.5) / 102 and its error, sqrt(17 - 64 / 102) / 102; z(0.975) = 1.959964.
    mean, half = 8 / 102, 1.959964 * (17 - 64 / 102) ** 0.5 / 102
    wanted = pytest.approx((mean - half, mean + half), rel=1e-6)
    assert paired_interval(12, 4, 100, 0.95) == wanted
    assert paired_interval(4, 12, 100, 0.95) == pytest.approx(
        (-mean - half, -mean + half), rel=1e-6
    )


@pytest.mark.parametrize(("lost", "gained"), [(0.01, 0.01), (0.1, 0.02), (0.0, 0.0)])
def test_nineteen_of_twenty_paired_intervals_hold_the_difference(lost, gained):
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([lost, gained, 1 - lost - gained])
    draws = shares.multinomial(500 * 400, replacement=True, generator=generator).view(400, 500)
    held = 0
    for draw in draws:
        counts = draw.bincount(minlength=3).tolist()
        low, high = paired_interval(counts[0], counts[1], 500, 0.95)
        held += low <= lost - gained <= high
    assert held >= 0.92 * 400

"""Skipping where it costs least: the least cost of all ways to skip as much."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelopt_sparse.calibration.budget import HeadCost, shares


def cost(heads: list[HeadCost], found: list[float]) -> float:
    """Linear between the points of a convex cost."""
    total = 0.0
    for head, share in zip(heads, found, strict=True):
        tiles, points = (
            share * head.tiles,
            [(0.0, 0.0), *zip(head.skipped, head.errors, strict=True)],
        )
        for (x, y), (to_x, to_y) in pairwise(points):
            if x <= tiles <= to_x + 1e-9:
                total += y + (to_y - y) * (tiles - x) / (to_x - x)
                break
    return total


steps = st.lists(st.floats(0.01, 5.0), min_size=3, max_size=3).map(sorted)


@given(st.lists(steps, min_size=2, max_size=3), st.floats(0.05, 0.95))
def test_no_other_way_to_skip_as_much_costs_less(slopes, target):
    heads = []
    for own in slopes:
        errors = [0.0]
        for slope in own:
            errors.append(errors[-1] + slope * 10)
        heads.append(HeadCost(30.0, (10.0, 20.0, 30.0), tuple(errors[1:])))
    found = shares(heads, target)
    assert sum(found) == pytest.approx(target * len(heads))
    least = cost(heads, found)
    for other in product([0.0, 1 / 3, 2 / 3, 1.0], repeat=len(heads)):
        if sum(other) >= target * len(heads):
            assert cost(heads, list(other)) >= least - 1e-6


def test_a_dear_step_before_a_cheap_one_is_taken_with_it():
    """The hull: 5 tiles for 10, then 15 more for 2, is 20 for 12."""
    odd = HeadCost(20.0, (5.0, 20.0), (10.0, 12.0))
    even = HeadCost(20.0, (10.0, 20.0), (9.0, 18.0))
    assert shares([odd, even], 0.5) == [1.0, 0.0]


def test_heads_without_tiles_and_targets_out_of_reach():
    nothing = HeadCost(0.0, (0.0, 0.0), (0.0, 0.0))
    some = HeadCost(10.0, (0.0, 4.0), (0.0, 1.0))
    assert shares([nothing, some], 0.2) == [0.0, pytest.approx(0.2)]
    assert shares([nothing, some], 0.9) == [0.0, pytest.approx(0.4)]

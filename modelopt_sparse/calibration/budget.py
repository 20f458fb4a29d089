"""Where to skip: all heads together as much as is asked for, and where it costs the output least."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

PROBES = tuple(2.0**-octave for octave in range(13))
"""The lambdas for which the error of the output is measured, falling."""


@dataclass(frozen=True)
class HeadCost:
    """What skipping costs one head.

    Args:
        tiles: how many it sees.
        skipped: how many each probe skips.
        errors: what that costs, as a share of the squared output of the head's layer.
    """

    tiles: float
    skipped: tuple[float, ...]
    errors: tuple[float, ...]


def shares(heads: Sequence[HeadCost], target: float) -> list[float]:
    """The share of its tiles that each head is to skip.

    Between probes the cost is taken as linear. Steps are taken by what they cost a tile, the cheapest first,
    until `target` of all tiles is reached or there are none left: of convex costs that is the least in all.
    """
    steps = sorted(
        (slope, index, tiles) for index, head in enumerate(heads) for slope, tiles in _steps(head)
    )
    left = target * sum(head.tiles for head in heads)
    taken = [0.0] * len(heads)
    for _, index, tiles in steps:
        part = min(tiles, left)
        taken[index] += part
        left -= part
    return [
        tiles / head.tiles if head.tiles else 0.0 for tiles, head in zip(taken, heads, strict=True)
    ]


def _steps(head: HeadCost) -> Iterable[tuple[float, float]]:
    """The lower convex hull of a head's costs: cost of a tile and number of tiles, step by step."""
    hull = [(0.0, 0.0)]
    for point in sorted(zip(head.skipped, head.errors, strict=True)):
        if point[0] <= hull[-1][0]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(_slope(a, b), b[0] - a[0]) for a, b in pairwise(hull)]


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])

"""From which sparsity, and from which length on, skipping is faster than the fastest dense kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from .case import OWN_DENSE
from .run import Row, fastest_rivals

LEAST_SPARSITY = 0.3
"""Sparsity from which the cost of a skipped tile can be told from noise."""
USUAL_SPARSITY = 0.5
"""Sparsity that advice on the context assumes."""


@dataclass(frozen=True)
class BreakEven:
    """What one case with skipped tiles says.

    Args:
        rival: the fastest dense kernel besides our own.
        dense_share: its time over that of our own dense kernel; above 1 ours is the fastest there is.
        tile_cost: the cost of a skipped tile, as a share of that of a computed one.
        sparsity: the share of tiles from which skipping is faster than the rival; 0 where it always is, and
            above 1 where it never is.
    """

    case: str
    length: int | None
    rival: str
    dense_share: float
    tile_cost: float
    sparsity: float


@dataclass(frozen=True)
class Advice:
    """Where skipping pays.

    Args:
        min_context: the least length, in tokens, from which on USUAL_SPARSITY is enough; None if none is.
        min_sparsity: the least that is enough at that length and all longer ones.
    """

    min_context: int | None
    min_sparsity: float | None


def break_evens(rows: Sequence[Row]) -> list[BreakEven]:
    """Of all cases that skip enough tiles and stand beside our own dense kernel and a rival."""
    own_dense = {row.case: row.ratio for row in rows if row.peer == OWN_DENSE}
    found = []
    for case, rival in fastest_rivals(rows).items():
        own, skipped = own_dense.get(case), rival.sparsity or 0.0
        if own is None or rival.ratio is None or skipped < LEAST_SPARSITY:
            continue
        dense_share = rival.ratio / own
        tile_cost = (1 / own - (1 - skipped)) / skipped
        needed = max(0.0, (1 - dense_share) / max(1 - tile_cost, 1e-9))
        found.append(BreakEven(case, rival.length, rival.peer, dense_share, tile_cost, needed))
    return found


def advice(found: Sequence[BreakEven]) -> Advice:
    """From cases of whole prompts: the least of several at one length counts."""
    needed: dict[int, float] = {}
    for each in found:
        if each.length is not None:
            needed[each.length] = min(each.sparsity, needed.get(each.length, each.sparsity))
    longest_first = sorted(needed, reverse=True)
    enough = list(takewhile(lambda length: needed[length] <= USUAL_SPARSITY, longest_first))
    if not enough:
        return Advice(None, None)
    return Advice(enough[-1], max(needed[length] for length in enough))

"""What each lambda would skip in the calls of one module, by length: counted in the forward pass itself."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from modelopt_sparse.calls import AttentionCall, Piece
from modelopt_sparse.errors import UnsupportedCall, describe
from modelopt_sparse.kernels.types import (
    AttentionOutput,
    Phase,
    Plan,
    SkipSoftmax,
    SkipSoftmaxDecode,
)

# Prompts are counted in pieces that end at these positions.
CUTS = tuple(512 * 2**octave for octave in range(21))
# Steps of decode are taken together with those at most so near in length.
_BUCKETS_PER_OCTAVE = 4


@dataclass(frozen=True, eq=False)
class Tally:
    """Tiles of rows at like positions.

    Args:
        histogram: int64 [BINS, Hq], by the lambda at which they fall.
        rows: how many rows. keys: those of their sequences, added up. longest: the most that a row saw.
    """

    histogram: Tensor
    rows: int
    keys: int
    longest: int

    def __add__(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(
            self.histogram + other.histogram,
            self.rows + other.rows,
            self.keys + other.keys,
            max(self.longest, other.longest),
        )

    def of_all_heads(self) -> Tally:
        """The same without telling heads apart: [BINS, 1]."""
        return replace(self, histogram=self.histogram.sum(1, keepdim=True))


Tallies = dict[tuple[Phase, int], Tally]
"""By phase and place. A prompt's place is that of `CUTS` where its piece ends or would, that of a step of
decode its length, in steps of a quarter of an octave."""


def added(tallies: Iterable[Tallies]) -> Tallies:
    """The tallies of all of these."""
    total: Tallies = {}
    for each in tallies:
        for place, tally in each.items():
            total[place] = total[place] + tally if place in total else tally
    return total


@dataclass
class Recorder:
    """Observes a module: its calls are computed densely, and what every lambda would skip is counted.

    A prompt is counted in pieces, each as long as all before it: rows see only the keys before them, so the
    first n rows of a prompt are a prompt of n tokens.

    Args:
        plan: what the module leaves out. Its thresholds are only counted.
    """

    plan: Plan
    tallies: Tallies = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.plan = counting(self.plan)

    def __call__(self, call: AttentionCall, plan: Plan) -> AttentionOutput:
        """The call with nothing skipped.

        Raises:
            UnsupportedCall: the call is bidirectional.
        """
        if not call.options.get("causal", True):
            remedy = "Leave such modules out of what is calibrated."
            got = "bidirectional attention"
            raise UnsupportedCall(describe("calibration", got, "causal attention", remedy))
        rows, heads = call.q.shape[:2]
        out = call.q.new_zeros(rows, heads, call.v.shape[-1])
        lse = torch.full((rows, heads), -torch.inf, device=out.device)
        for piece in call.pieces(CUTS):
            found = piece.call(self.plan)
            out[piece.rows], lse[piece.rows] = found.out, found.lse.float()
            self._count(piece, found)
        return AttentionOutput(out, lse)

    def _count(self, piece: Piece, found: AttentionOutput) -> None:
        counts = found.prefill if piece.phase is Phase.PREFILL else found.decode
        if counts is None or counts.histogram is None:
            return
        rows, longest = piece.call.q.shape[0], piece.call.seqs.max_k
        if piece.phase is Phase.PREFILL:
            place = next(cut for cut in CUTS if cut >= longest)
        else:
            place = round(_BUCKETS_PER_OCTAVE * math.log2(piece.n_k))
        tally = Tally(counts.histogram.cpu(), rows, rows * piece.n_k, longest)
        self.tallies = added([self.tallies, {(piece.phase, place): tally}])


def counting(plan: Plan) -> Plan:
    """The plan with tiles counted by lambda, and none skipped."""
    return replace(plan, skip=_counting(plan.skip), skip_decode=_counting(plan.skip_decode))


S = TypeVar("S", SkipSoftmax, SkipSoftmaxDecode)


def _counting(skip: S | None) -> S | None:
    if skip is None:
        return None
    return replace(
        skip,
        threshold=None,
        scale_factor=None,
        count_thresholds=(),
        histogram=True,
        min_context=0,
    )


def by_length(tallies: Tallies, phase: Phase) -> dict[int, Tensor]:
    """Histograms [BINS, Hq] of one sequence of each length: float64, by number of keys, rising.

    Prompts end where a piece does, and where the longest does; steps of decode are as long as those that
    were counted, on average. What isn't known from its first row on isn't among them.
    """
    places = sorted(place for own, place in tallies if own is phase)
    found = {place: tallies[phase, place] for place in places}
    if phase is Phase.DECODE:
        return {round(t.keys / t.rows): t.histogram.double() / t.rows for t in found.values()}
    histograms: dict[int, Tensor] = {}
    start, total = 0, torch.zeros(())
    for cut in CUTS:
        if cut not in found:
            break
        end = min(cut, found[cut].longest)
        total = total + found[cut].histogram.double() * ((end - start) / found[cut].rows)
        histograms[end] = total
        if end < cut:
            break
        start = cut
    return histograms

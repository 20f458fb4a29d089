"""What each lambda would skip in the calls of one module, by length: counted in the forward pass itself."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from modelopt_sparse.calls import AttentionCall, Piece
from modelopt_sparse.errors import UnsupportedCall, describe
from modelopt_sparse.faithfulness.differences import differences
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
        histogram: int64 [BINS, U], by the lambda at which they fall. U: heads, or in decode groups of heads
            that decide together.
        errors: float64 [1 + probes, U], sums of squares: of the dense output, and of what each probe's
            differs from it.
        masses: float64 [1 + probes, U]: query rows of these heads that see a key, and the mass that each
            probe drops of them, added up.
        largest: float64 [probes, U], the most that each probe drops of one row.
        rows: how many rows. keys: those of their sequences, added up.
        shortest, longest: the least of these, and the most that a row saw.
    """

    histogram: Tensor
    errors: Tensor
    masses: Tensor
    largest: Tensor
    rows: int
    keys: int
    shortest: int
    longest: int

    def __add__(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(
            self.histogram + other.histogram,
            self.errors + other.errors,
            self.masses + other.masses,
            torch.maximum(self.largest, other.largest),
            self.rows + other.rows,
            self.keys + other.keys,
            min(self.shortest, other.shortest),
            max(self.longest, other.longest),
        )

    @property
    def squared_output(self) -> float:
        """The dense output's sum of squares; 1 where it is nothing, which skipping doesn't change."""
        return float(self.errors[0].sum()) or 1.0

    def of_all_heads(self) -> Tally:
        """The same without telling heads apart: U is 1."""
        return replace(
            self,
            histogram=self.histogram.sum(1, keepdim=True),
            errors=self.errors.sum(1, keepdim=True),
            masses=self.masses.sum(1, keepdim=True),
            largest=self.largest.amax(1, keepdim=True),
        )

    def weighted(self, weight: float) -> Tally:
        """The same, as often as `weight` says."""
        return replace(
            self,
            histogram=self.histogram.double() * weight,
            errors=self.errors * weight,
            masses=self.masses * weight,
        )


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
        plan: what the module leaves out. Its thresholds don't matter.
        probes: lambdas to try, for what they do to the output.
        weighs: whether the mass that they drop is wanted, which kernels then sum.
        heads: query heads of the calls, known after the first.
    """

    plan: Plan
    probes: tuple[float, ...] = ()
    weighs: bool = False
    tallies: Tallies = field(default_factory=dict)
    heads: int = 0

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
            found = piece.call(with_lambda(self.plan, None))
            out[piece.rows], lse[piece.rows] = found.out, found.lse.float()
            self._count(piece, found)
        return AttentionOutput(out, lse)

    def _count(self, piece: Piece, found: AttentionOutput) -> None:
        counts = found.prefill if piece.phase is Phase.PREFILL else found.decode
        if counts is None or counts.histogram is None:
            return
        rows, longest = piece.call.q.shape[0], piece.call.seqs.max_k
        self.heads = piece.call.q.shape[1]
        if piece.phase is Phase.PREFILL:
            place = next(cut for cut in CUTS if cut >= longest)
        else:
            place = round(_BUCKETS_PER_OCTAVE * math.log2(piece.n_k))
        whole = differences(found, found)
        probed = [
            differences(found, piece.call(with_lambda(self.plan, probe), details=self.weighs))
            for probe in self.probes
        ]
        # Both [1 + probes, rows, Hq].
        errors = torch.stack([whole.squared_norm, *(one.squared_error for one in probed)])
        masses = torch.stack([whole.sees, *(one.dropped_mass for one in probed)])
        voters = self._voters(piece)
        tally = Tally(
            _by_voters(counts.histogram, voters).sum(2).cpu(),
            _by_voters(errors.sum(1), voters).sum(2).cpu(),
            _by_voters(masses.sum(1), voters).sum(2).cpu(),
            _by_voters(masses[1:].amax(1), voters).amax(2).cpu(),
            rows,
            rows * piece.n_k,
            piece.n_k,
            longest,
        )
        self.tallies = added([self.tallies, {(piece.phase, place): tally}])

    def _voters(self, piece: Piece) -> int:
        """How many heads decide together."""
        if piece.phase is Phase.PREFILL or self.plan.skip_decode is None:
            return 1
        return self.plan.skip_decode.vote_heads or self.heads // piece.call.k.shape[-2]


def _by_voters(values: Tensor, voters: int) -> Tensor:
    """[.., Hq] by groups of heads that decide together: [.., U, voters]."""
    return values.view(len(values), values.shape[1] // voters, voters)


def with_lambda(plan: Plan, threshold: float | None) -> Plan:
    """The plan with this lambda in both phases; with None, nothing is skipped, and what every lambda would
    skip is counted."""
    skip, decode = plan.skip, plan.skip_decode
    return replace(
        plan,
        skip=None if skip is None else _with_lambda(skip, threshold),
        skip_decode=None if decode is None else _with_lambda(decode, threshold),
    )


S = TypeVar("S", SkipSoftmax, SkipSoftmaxDecode)


def _with_lambda(skip: S, threshold: float | None) -> S:
    return replace(
        skip,
        threshold=threshold,
        scale_factor=None,
        count_thresholds=(),
        histogram=threshold is None,
        min_context=0,
    )


def by_length(tallies: Tallies, phase: Phase) -> dict[int, Tally]:
    """What was counted, of one sequence of each length: by number of keys, rising.

    Prompts end where a piece does, and where the longest does; steps of decode are as long as those that
    were counted, on average. What isn't known from its first row on isn't among them.
    """
    places = sorted(place for own, place in tallies if own is phase)
    found = {place: tallies[phase, place] for place in places}
    if phase is Phase.DECODE:
        return {round(t.keys / t.rows): t.weighted(1 / t.rows) for t in found.values()}
    lengths: dict[int, Tally] = {}
    start, total = 0, None
    for cut in CUTS:
        if cut not in found:
            break
        end = min(cut, found[cut].longest)
        piece = found[cut].weighted((end - start) / found[cut].rows)
        total = piece if total is None else total + piece
        lengths[end] = total
        if end < cut:
            break
        start = cut
    return lengths


def shortest(tallies: Iterable[Tallies], phases: Collection[Phase]) -> int:
    """The least number of keys that something was counted for in these phases; 0 if nothing was."""
    found = [
        min(CUTS[0], tally.longest) if phase is Phase.PREFILL else tally.shortest
        for each in tallies
        for (phase, place), tally in each.items()
        if phase in phases and (phase is Phase.DECODE or place == CUTS[0])
    ]
    return min(found, default=0)

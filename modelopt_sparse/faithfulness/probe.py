"""How far one module's sparse attention is from its dense one, on the same queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_sparse.calls import AttentionCall
from modelopt_sparse.kernels.types import DENSE, AttentionOutput, Phase, Plan, TileCounts

from .differences import differences
from .results import ByHead, DroppedMass, PhaseComparison


@dataclass
class _Sums:
    """What was measured of one phase, on the device, by head.

    Args:
        added: float64 [5, Hq], sums over query rows of `Differences`.
        largest: float64 [2, Hq], of the dropped mass and its bound.
        skips: whether the plan skips tiles in this phase.
    """

    added: Tensor
    largest: Tensor
    skips: bool


class Probe:
    """Computes each call dense and sparse, notes how they differ, and has the model go on dense."""

    def __init__(self) -> None:
        self._sums: dict[Phase, _Sums] = {}

    def __call__(self, call: AttentionCall, plan: Plan) -> AttentionOutput:
        dense, sparse = call(DENSE), call(plan, details=True)
        measured = torch.stack(differences(dense, sparse))  # [5, Tq, Hq]
        for phase, rows in _rows_by_phase(call).items():
            part = plan.skip if phase is Phase.PREFILL else plan.skip_decode
            self._add(phase, measured[:, rows], part is not None)
        return dense

    def _add(self, phase: Phase, measured: Tensor, skips: bool) -> None:
        added, largest = measured.sum(1), measured[3:].amax(1)
        before = self._sums.get(phase)
        if before is not None:
            added, largest = before.added + added, torch.maximum(before.largest, largest)
            skips = skips or before.skips
        self._sums[phase] = _Sums(added, largest, skips)

    @property
    def was_called(self) -> bool:
        """Whether the module had any call with a row in it."""
        return bool(self._sums)

    def result(self, phase: Phase, counts: TileCounts | None) -> PhaseComparison | None:
        """What was measured in a phase, with the tile counts of the sparse pass; None if nothing was."""
        sums = self._sums.get(phase)
        if sums is None:
            return None
        rows, error, norm, *masses = sums.added
        dropped, bound = (
            DroppedMass(mean=_share(mass, rows), max=_largest(largest))
            for mass, largest in zip(masses, sums.largest, strict=True)
        )
        return PhaseComparison(
            rows=int(rows.max()),
            relative_error=_share(error, norm, root=True),
            sparsity=None if counts is None else _share(counts.skipped[0], counts.visible),
            dropped_mass=dropped if sums.skips else None,
            dropped_mass_bound=bound if sums.skips else None,
        )


def _rows_by_phase(call: AttentionCall) -> dict[Phase, Tensor]:
    """Numbers of the rows of each phase that the call has rows of. Waits for the device.

    Rows that no sequence owns see no key: whatever phase they are put in, they add nothing.
    """
    seqs, given = call.seqs, call.options.get("phase")
    is_single = torch.zeros(len(call.q), dtype=torch.bool, device=call.q.device)
    is_single[seqs.q_start[seqs.q_len == 1].long()] = True
    decodes = torch.full_like(is_single, given is Phase.DECODE) if given else is_single
    found = {Phase.PREFILL: (~decodes).nonzero()[:, 0], Phase.DECODE: decodes.nonzero()[:, 0]}
    return {phase: rows for phase, rows in found.items() if len(rows)}


def _share(part: Tensor, whole: Tensor, root: bool = False) -> ByHead:
    """`part` over `whole`, or the root of it, of all heads together and of each. 0 of nothing is 0."""
    parts, wholes = (torch.cat([x.sum()[None], x]).double() for x in (part, whole))
    shares = torch.where(parts == 0, 0.0, parts / wholes)
    overall, *heads = (shares.sqrt() if root else shares).tolist()
    return ByHead(overall=overall, heads=tuple(heads))


def _largest(values: Tensor) -> ByHead:
    return ByHead(overall=values.max().item(), heads=tuple(values.tolist()))

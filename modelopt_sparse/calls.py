"""What who observes a sparse module gets to see: the module's calls, to be run as often as it likes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from modelopt_sparse.kernels.api import AttentionOptions
from modelopt_sparse.kernels.types import AttentionOutput, Phase, Plan, ScoreGrid, Seqs

Observer = Callable[["AttentionCall", Plan], AttentionOutput]
"""Is given a call and the plan in force, and returns the output that the model shall go on with."""


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of a module, all but for what it leaves out.

    Args:
        run: `kernels.attention_varlen`, or the reference if that is what the module runs.
        q, k, v, seqs: as `run` takes them.
        options: the other arguments of `run`, without the plan.
    """

    run: Callable[..., AttentionOutput]
    q: Tensor
    k: Tensor
    v: Tensor
    seqs: Seqs
    options: AttentionOptions

    def __call__(self, plan: Plan, *, details: bool = False) -> AttentionOutput:
        """The call with this plan. With `details`, it returns decisions and dropped mass too."""
        return self.run(
            self.q, self.k, self.v, self.seqs, **self.options, plan=plan, details=details
        )

    def pieces(self, cuts: Sequence[int]) -> Iterator[Piece]:
        """The call's rows, piece by piece. Waits for the device.

        A piece has rows of one sequence, and is computed as within it. Where rows are the last of their
        sequence (`causal`), sequences that prefill are cut before each position of `cuts`.
        """
        is_causal = self.options.get("causal", True)
        lengths = zip(self.seqs.q_len.tolist(), self.seqs.k_len.tolist(), strict=True)
        for index, (n_q, n_k) in enumerate(lengths):
            if not n_q:
                continue
            phase = Phase.of(n_q, self.options.get("phase"))
            first = n_k - n_q if is_causal else 0
            is_cut = is_causal and phase is Phase.PREFILL
            inside = [cut for cut in cuts if first < cut < n_k] if is_cut else []
            bounds = [first, *inside, first + n_q]
            for start, end in pairwise(bounds):
                yield self._piece(index, phase, slice(start - first, end - first), start, n_k)

    def _piece(self, index: int, phase: Phase, rows: slice, position: int, n_k: int) -> Piece:
        """Rows of sequence `index`, the first of which is at `position`."""
        seqs = self.seqs
        count = rows.stop - rows.start
        keys = position + count if self.options.get("causal", True) else n_k
        offset = int(seqs.q_start[index])
        own = slice(offset + rows.start, offset + rows.stop)

        def numbers(value: int) -> Tensor:
            return torch.full_like(seqs.q_len[:1], value)

        def grid(scores: ScoreGrid | None) -> ScoreGrid | None:
            if scores is None:
                return None
            row_start = (
                numbers(0) if scores.row_start is None else scores.row_start[index : index + 1]
            )
            key_start = None if scores.key_start is None else scores.key_start[index : index + 1]
            return ScoreGrid(scores.values[index : index + 1], row_start + rows.start, key_start)

        options = self.options.copy()
        options["phase"] = phase
        options["mask"], options["bias"] = grid(options.get("mask")), grid(options.get("bias"))
        if (bounds := options.get("bounds")) is not None:
            options["bounds"] = bounds[own]
        call = replace(
            self,
            q=self.q[own],
            seqs=Seqs(
                numbers(0), numbers(count), seqs.k_start[index : index + 1], numbers(keys),
                max_q=count, max_k=keys, min_q=count,
            ),
            options=options,
        )  # fmt: skip
        return Piece(call, phase, own, position, n_k)


@dataclass(frozen=True, eq=False)
class Piece:
    """Consecutive rows of one sequence.

    Args:
        call: of these rows alone.
        phase: that of the sequence.
        rows: which they are of the whole call's.
        position: that of the first one.
        n_k: keys of the sequence.
    """

    call: AttentionCall
    phase: Phase
    rows: slice
    position: int
    n_k: int

"""The forward pass of a checked call: which kernels its sequences need."""

from __future__ import annotations

import math
from dataclasses import dataclass

from modelopt_sparse.errors import UnsupportedCall, describe

from .check import Call
from .decode import MOST_ROWS_OF_A_SEQUENCE, launch_decode
from .launching import clear_unowned, launching
from .prefill import launch_prefill
from .results import Results, allocate
from .types import Phase, Plan


def forward(call: Call, keep_tiles: bool) -> Results:
    """Computes a checked call whose scale is above 0.

    Args:
        keep_tiles: whether decisions are wanted even without ``call.details``.
    Raises:
        UnsupportedCall: the GPU is too small for it, or too many rows would decode together.
    """
    results = allocate(call, keep_tiles)
    if not call.k.shape[0]:
        results.out.zero_()
        results.lse.fill_(-math.inf)
        for tallies in (results.prefill, results.decode, results.bound, results.dropped):
            if tallies is not None:
                tallies.zero_()
        return results
    with launching(call):
        clear_unowned(
            results.out,
            call.seqs.q_start,
            call.seqs.q_len,
            lse=results.lse,
            counts=(results.prefill, results.decode),
            shares=(results.bound, results.dropped),
        )
        for route in routes(call):
            if route.phase is Phase.PREFILL:
                launch_prefill(route.call, results, only_prefill=route.only_prefill)
            else:
                launch_decode(route.call, results)
    return results


@dataclass(frozen=True)
class Route:
    """Some sequences of a call, and the phase whose kernels compute them.

    Args:
        only_prefill: of a phase that prefills, sequences of one row are left to another route.
    """

    phase: Phase
    call: Call
    only_prefill: bool = False


def routes(call: Call) -> list[Route]:
    """How the sequences of a checked call are shared out.

    Raises:
        UnsupportedCall: too many rows would decode together.
    """
    plan, max_q = call.plan, call.seqs.max_q
    if call.phase is Phase.PREFILL:
        return [Route(Phase.PREFILL, call)]
    if call.phase is None and max_q > 1:
        found = [Route(Phase.PREFILL, call, only_prefill=True)]
        return found + [Route(Phase.DECODE, call)] * (call.seqs.min_q < 2)
    if max_q <= MOST_ROWS_OF_A_SEQUENCE:
        return [Route(Phase.DECODE, call)]
    if plan.skip_decode is None:
        return [Route(Phase.PREFILL, call._replace(plan=Plan()))]
    takes = f"at most {MOST_ROWS_OF_A_SEQUENCE} rows a sequence"
    remedy = "Use phase=Phase.PREFILL, or attention_reference."
    raise UnsupportedCall(describe("plan.skip_decode", f"max_q {max_q}", takes, remedy))

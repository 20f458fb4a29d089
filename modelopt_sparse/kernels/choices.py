"""Which kernel a call gets, and why not the one that was made for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modelopt_sparse.errors import ArgumentError, describe

from .api import attention_paged, attention_varlen, packed_call, paged_call
from .backends import HAS_TRITON, IS_INTERPRETED
from .types import Phase


@dataclass(frozen=True)
class KernelChoice:
    """The kernel that computes the sequences of a call that are in a phase.

    Args:
        kernel: "reference"; "prefill" and "decode", which run on any GPU; "hopper prefill" and "hopper
            latents", made for compute capability 9.0.
        reasons: why it isn't the one made for a GPU; none where it is.
    """

    phase: Phase
    kernel: str
    reasons: tuple[str, ...] = ()


def explain(
    function: Callable[..., Any], /, *args: Any, **options: Any
) -> tuple[KernelChoice, ...]:
    """The kernels that a call would run, without running them.

    ``explain(attention_varlen, q, k, v, seqs, plan=plan)``

    Args:
        function: `attention_varlen` or `attention_paged`.
        args, options: what it would be called with.
    Returns:
        a choice for each phase in which the call may have sequences.
    Raises:
        ArgumentError, ArgumentTypeError, UnsupportedCall: as the call.
    """
    if function is attention_varlen:
        q, k, v, seqs = args
        call = packed_call(q, k, v, seqs, options)  # type: ignore[arg-type]
    elif function is attention_paged:
        q, cache, seqs = args
        call = paged_call(q, cache, seqs, options)  # type: ignore[arg-type]
    else:
        takes = "attention_varlen or attention_paged"
        raise ArgumentError(describe("function", repr(function), takes))
    if not HAS_TRITON or (call.q.device.type == "cpu" and not IS_INTERPRETED):
        phases = [call.phase] if call.phase is not None else list(Phase)
        return tuple(KernelChoice(phase, "reference", ("tensors on a CPU",)) for phase in phases)

    from .decode import rows_of
    from .forward import routes
    from .hopper_prefill import prefill_refusals
    from .latent import latent_refusals

    found = []
    for route in routes(call):
        if route.phase is Phase.PREFILL:
            why = tuple(prefill_refusals(route.call))
            found.append(KernelChoice(route.phase, "prefill" if why else "hopper prefill", why))
        else:
            members, max_q = rows_of(route.call)
            why = tuple(latent_refusals(route.call, members * max_q))
            found.append(KernelChoice(route.phase, "decode" if why else "hopper latents", why))
    return tuple(found)

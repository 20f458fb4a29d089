"""Which implementation computes a checked call: the Triton kernels on a GPU, the torch reference on a CPU."""

from __future__ import annotations

from modelopt_sparse.errors import UnsupportedCall, describe

from .check import Call
from .reference.attention import run as _run_reference
from .types import AttentionOutput

try:
    import triton
except ImportError:
    # Whoever asks for its kernels is told so.
    HAS_TRITON = IS_INTERPRETED = False
else:
    from .ops import run as _run_kernels

    HAS_TRITON = True
    # As Triton does, which makes its functions ones or the others when it defines them.
    IS_INTERPRETED = bool(triton.knobs.runtime.interpret)

_REMEDY = 'Use attention_reference, or backend="pytorch" in the configuration.'


def run(call: Call) -> AttentionOutput:
    """Computes a call where its tensors are."""
    return run_reference(call) if call.q.device.type == "cpu" else run_triton(call)


def run_reference(call: Call) -> AttentionOutput:
    """Computes a call with the torch reference."""
    return _run_reference(call)


def run_triton(call: Call) -> AttentionOutput:
    """Computes a call with the Triton kernels.

    Raises:
        UnsupportedCall: there is no Triton, or it can't run on the tensors' device.
    """
    device = call.q.device.type
    if not HAS_TRITON:
        got = f"tensors on {call.q.device}, and the package triton is not installed"
        raise UnsupportedCall(describe("q", got, "triton for GPU tensors", _REMEDY))
    if device not in ("cuda", "xpu") and not IS_INTERPRETED:
        takes = "tensors on a GPU, or any with TRITON_INTERPRET=1 in the environment"
        raise UnsupportedCall(describe("q", f"tensors on {call.q.device}", takes, _REMEDY))
    return _run_kernels(call)

"""Which kernels a traced call would run on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from modelopt_sparse.calls import AttentionCall
    from modelopt_sparse.config import Resolved


@dataclass(frozen=True)
class Choice:
    """What a call runs.

    Args:
        kernel: as `kernels.KernelChoice` names it; "none" where the call is refused.
        is_sparse: whether the module leaves anything out in this phase.
        reasons: why it isn't a kernel made for the GPU, or isn't sparse after all.
    """

    kernel: str
    is_sparse: bool
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = f"{self.kernel}, {'sparse' if self.is_sparse else 'dense'}"
        return f"{said}: {'; '.join(self.reasons)}" if self.reasons else said

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def chosen_kernel(call: AttentionCall, resolved: Resolved | None, device: torch.device) -> Choice:
    """The kernel that `call`, of one sequence, gets on `device`.

    Args:
        resolved: what its module does; None is dense.
    """
    from modelopt_sparse.errors import SparseAttentionError
    from modelopt_sparse.kernels import DENSE, Phase, attention_varlen, explain
    from modelopt_sparse.methods.registry import sparse_method

    plan, backend = DENSE, "triton"
    if resolved is not None:
        backend = resolved.config.backend
        plan = sparse_method(resolved.config.method)(resolved.config).plan()
        plan = plan if resolved.enabled else DENSE
    is_prefill = Phase.of(call.q.shape[0]) is Phase.PREFILL
    skip = plan.skip if is_prefill else plan.skip_decode
    is_sparse = skip is not None or (is_prefill and (plan.nm or plan.tiles) is not None)
    reasons: tuple[str, ...] = ()
    if skip is not None and call.k.shape[0] < skip.min_context:
        is_sparse = is_prefill and plan.nm is not None
        reasons = (f"{call.k.shape[0]} keys are fewer than min_context, {skip.min_context}",)
    if backend == "pytorch":
        return Choice("reference", is_sparse, ('backend="pytorch"', *reasons))
    here = on_device(call, device)
    try:
        (found,) = explain(
            attention_varlen, here.q, here.k, here.v, here.seqs, plan=plan, **here.options
        )
    except SparseAttentionError as error:
        return Choice("none", False, (str(error),))
    return Choice(found.kernel, is_sparse, (*found.reasons, *reasons))


def on_device(call: AttentionCall, device: torch.device) -> AttentionCall:
    """The call with tensors of the same shapes and strides that have memory, which nobody writes."""
    import torch

    from modelopt_sparse.kernels import Phase, ScoreGrid, Seqs

    def real(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _empty_like(value, device)
        # The choice doesn't depend on what a grid holds, and it has as many entries as scores.
        if isinstance(value, ScoreGrid):
            values = torch.zeros((), dtype=value.values.dtype, device=device)
            return ScoreGrid(values.expand(value.values.shape))
        return value

    n_q, n_k = call.q.shape[0], call.k.shape[0]
    options: Any = {name: real(value) for name, value in call.options.items()}
    # A call of one kind of sequence has one choice.
    options["phase"] = options["phase"] or Phase.of(n_q)
    q, k, v = map(real, (call.q, call.k, call.v))
    seqs = Seqs.from_lengths([n_q], [n_k], device=device)
    return replace(call, q=q, k=k, v=v, seqs=seqs, options=options)


def _empty_like(x: Tensor, device: torch.device) -> Tensor:
    import torch

    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

"""The attention calls of a model that was never loaded: its own forward, on tensors without memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from modelopt_sparse.calls import AttentionCall, Observer

# Every attention module, so that each can be observed.
_EVERYTHING = {
    "sparse_cfg": {"*": {"method": "triton_skip_softmax"}},
    "include_non_causal": True,
}


@dataclass(frozen=True)
class Trace:
    """What the attention modules of a model are called with.

    Args:
        prefill, decode: by module name, its call for a prompt and for the token after it. A module that
            isn't named isn't called by text.
    """

    prefill: dict[str, AttentionCall] = field(default_factory=dict)
    decode: dict[str, AttentionCall] = field(default_factory=dict)


def empty_model(config: PretrainedConfig) -> tuple[PreTrainedModel, Any]:
    """The causal language model of a configuration, and the mode in which its tensors have no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    auto_class: Any = AutoModelForCausalLM
    with mode:
        # Grouped products of experts are checked for dtypes that the CPU's don't take; these aren't.
        model = auto_class.from_config(config, experts_implementation="batched_mm")
    return model.eval(), mode


def trace(model: PreTrainedModel, mode: Any, length: int) -> Trace:
    """The calls for a prompt of `length` tokens, and for the next one. The model is made sparse on the way.

    Raises:
        UnsupportedModel: a part of the model reads the values of its tensors.
    """
    import torch

    import modelopt_sparse as mtsa
    from modelopt_sparse.errors import UnsupportedModel, describe
    from modelopt_sparse.module import observed
    from modelopt_sparse.module_state import sparse_modules

    found = Trace()
    mtsa.sparsify(model, _EVERYTHING)
    modules = list(sparse_modules(model))
    try:
        with torch.no_grad(), mode:
            prompt, token = torch.zeros(1, length).long(), torch.zeros(1, 1).long()
            with observed({module: _noting(name, found.prefill) for name, module in modules}):
                output = model(prompt, use_cache=True, logits_to_keep=1)
            with observed({module: _noting(name, found.decode) for name, module in modules}):
                model(token, use_cache=True, past_key_values=output.past_key_values)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        got = f"a {type(model).__name__}, whose forward doesn't run without values: {error}"
        takes = "a model whose calls can be found out without loading it"
        raise UnsupportedModel(describe("MODEL", got, takes)) from error
    finally:
        mtsa.unsparsify(model)
    return found


def _noting(name: str, calls: dict[str, AttentionCall]) -> Observer:
    from modelopt_sparse.kernels import AttentionOutput, Plan

    def observe(call: AttentionCall, plan: Plan) -> AttentionOutput:
        calls[name] = call
        rows, heads, _ = call.q.shape
        out = call.q.new_empty(rows, heads, call.v.shape[-1])
        return AttentionOutput(out, out.new_empty(rows, heads))

    return observe


def unreached(model: nn.Module, reached: set[str]) -> dict[str, str]:
    """Modules that attend, by their class's name, without transformers' attention interface."""
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower()
        and not any(
            name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.")
            for other in reached
        )
    }

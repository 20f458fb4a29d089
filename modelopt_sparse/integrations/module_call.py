"""Attention of one module's call, whichever way its host hands it over: dense, or by the module's plan."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_sparse.calls import AttentionCall
from modelopt_sparse.errors import (
    ArgumentError,
    ArgumentTypeError,
    UnsupportedCall,
    describe,
)
from modelopt_sparse.kernels.api import AttentionOptions, attention_reference, attention_varlen
from modelopt_sparse.kernels.types import DENSE, Phase, Plan
from modelopt_sparse.module import SparseAttentionModule

from .capture import is_capturing
from .packing import Visibility, pack

# Keyword arguments that the models of transformers 5.17 to 5.23, its Trainer and its generation
# hand down to the attention function, and that do not change what attention computes.
HARMLESS_KWARGS = frozenset(
    {
        "cache_params",
        "cache_position",
        "deterministic",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "ignore_index",
        "image_sizes",
        "input_ids",
        "labels",
        "layer_idx",
        "logits_to_keep",
        "mm_token_type_ids",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "seq_idx",
        "shift_labels",
        "token_type_ids",
        "use_cache",
    }
)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility,
    *,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Packs the call, computes it with the module's plan if it is sparse, and counts its tiles.

    Args:
        module: the attention module that calls.
        query: [B, Hq, Lq, D]; key: [B, Hk, Lkv, D]; value: [B, Hk, Lkv, Dv], any strides.
        visibility: which keys a row sees.
        scaling, sliding_window, softcap, s_aux: see `hf.modelopt_triton_attention`.
    Returns:
        out [B, Lq, Hq, Dv], contiguous, 0 in rows that see no key.
    Raises:
        UnsupportedCall, ArgumentError: see `hf.modelopt_triton_attention`.
    """
    _check_heads(query, key, value)
    causal = visibility.causal
    sparse = module if isinstance(module, SparseAttentionModule) else None
    run = attention_varlen
    in_force: AbstractContextManager[Plan] = nullcontext(DENSE)
    if sparse is not None:
        if causal and visibility.attention_mask is None and visibility.cu_seq_lens_q is None:
            _check_square(query.shape[2], key.shape[2])
        if sparse.method.config.backend == "pytorch":
            run = attention_reference
        in_force = sparse.plan_in_force()
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    # Autocast would lower the precision of what the kernels compute in fp32.
    with in_force as plan, torch.autocast(device, enabled=False):
        packed = pack(query, key, value, visibility, reader=id(module))
        options: AttentionOptions = {
            "causal": causal,
            "scale": scaling,
            "window": sliding_window if causal and visibility.attention_mask is None else None,
            "softcap": softcap,
            "sinks": s_aux,
            "bounds": packed.bounds,
            "mask": packed.mask,
            "bias": packed.bias,
            # Only padding leaves a sequence of one row in a bidirectional call of several.
            "phase": None if causal or query.shape[2] == 1 else Phase.PREFILL,
        }
        call = AttentionCall(run, packed.q, packed.k, packed.v, packed.seqs, options)
        observer = None if sparse is None else sparse.observer
        output = call(plan) if observer is None else observer(call, plan)
    # Replays of a CUDA graph would write counts where nobody keeps them.
    if sparse is not None and not is_capturing(query.device):
        sparse.record(output)
    return packed.unpack(output.out)


def refuse(dropout: float, output_attentions: bool | None, kwargs: dict[str, Any]) -> None:
    """Raises `UnsupportedCall` for what would change the result and is not offered."""
    if dropout:
        remedy = "Set the model's attention dropout to 0, or call model.eval()."
        raise UnsupportedCall(describe("dropout", dropout, "0", remedy))
    if output_attentions:
        remedy = 'Use attn_implementation="eager" to get the attention weights.'
        raise UnsupportedCall(describe("output_attentions", output_attentions, "False", remedy))
    for name, value in kwargs.items():
        if value is None or name in HARMLESS_KWARGS:
            continue
        takes = "None: attention with it is not offered"
        raise UnsupportedCall(describe(name, f"a {type(value).__name__}", takes))


def is_causal_call(module: nn.Module, is_causal: bool | None) -> bool:
    """Whether rows see only keys up to their own: what the call says, else what the module does."""
    if not isinstance(is_causal, bool | None):
        raise ArgumentTypeError(describe("is_causal", repr(is_causal), "True, False or None"))
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raises unless each key head has as many query heads."""
    if query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1]:
        got = f"{query.shape[1]} query heads, {key.shape[1]} and {value.shape[1]}"
        takes = "equal numbers that divide the query's"
        raise ArgumentError(describe("key and value heads", got, takes))


def _check_square(n_q: int, n_kv: int) -> None:
    """Raises `UnsupportedCall` where no mask could mean the first or the last keys.

    Our mask function always returns a mask then. Another one was asked if only a part of the model is
    sparse, such as its list of layers, and sdpa's means the first keys when a static cache is empty.
    """
    if 1 < n_q < n_kv:
        got = f"None with {n_q} rows and {n_kv} keys"
        remedy = "Sparsify the whole model, which builds its masks for this attention."
        raise UnsupportedCall(describe("attention_mask", got, "a mask", remedy))

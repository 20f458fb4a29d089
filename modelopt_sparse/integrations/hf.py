"""The attention function that is registered with transformers, and its registration."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from modelopt_sparse.errors import ArgumentTypeError, describe

from .masks import interval_mask
from .module_call import attend, is_causal_call, refuse
from .packing import Visibility

# transformers tests names for parts: one that holds "flash", "sdpa", "flex_attention" or "paged|",
# or looks like a repository, is treated as that implementation.
ATTENTION_NAME = "modelopt_triton"


def register() -> None:
    """Makes ``attn_implementation="modelopt_triton"`` known to transformers. May be called again.

    The mask function is registered with the attention function: without one, transformers silently
    drops padding masks.
    """
    AttentionInterface.register(ATTENTION_NAME, modelopt_triton_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, interval_mask)


def modelopt_triton_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one module's call: with the module's plan if it is sparse, else dense.

    Args:
        module: the attention module that calls.
        query: [B, Hq, Lq, D]; key: [B, Hk, Lkv, D]; value: [B, Hk, Lkv, Dv], any strides. Hk
            divides Hq.
        attention_mask: None, an interval mask (see `masks.interval_mask`), or a bool or additive
            float mask that broadcasts to [B, Hq, Lq, Lkv]. None means causal up to the last key, or
            everything if not causal. A mask says all; `is_causal` and `sliding_window` add nothing
            to it.
        scaling: multiplies q·k; default D ** -0.5.
        dropout: must be 0.
        is_causal: default ``module.is_causal``, or True if it has none.
        sliding_window: a row sees the last `sliding_window` keys up to its own. Causal only.
        softcap: scores become softcap * tanh(score / softcap).
        s_aux: [Hq] logits that join the softmax's denominator.
        position_bias: added to the scores; broadcasts to [B, Hq, Lq, Lkv].
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: where sequences lie packed in a
            batch of one; see `packing.Visibility`.
        output_attentions: must be false; the weights never exist as a tensor.
        kwargs: those of `module_call.HARMLESS_KWARGS` are ignored.
    Returns:
        out [B, Lq, Hq, Dv], contiguous, 0 in rows that see no key; and None for the weights.
    Raises:
        UnsupportedCall: an argument that would change the result is not offered.
        ArgumentError: a shape or dtype is not taken.
    """
    refuse(dropout, output_attentions, kwargs)
    if not isinstance(attention_mask, Tensor | None):
        got = repr(attention_mask)
        raise ArgumentTypeError(describe("attention_mask", got, "a tensor or None"))
    visibility = Visibility(
        attention_mask,
        is_causal_call(module, is_causal),
        position_bias,
        cu_seq_lens_q,
        cu_seq_lens_k,
        max_length_q,
        max_length_k,
    )
    out = attend(
        module,
        query,
        key,
        value,
        visibility,
        scaling=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        s_aux=s_aux,
    )
    return out, None

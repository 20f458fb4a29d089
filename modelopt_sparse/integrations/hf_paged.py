"""The attention function for transformers' continuous batching, and its registration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from modelopt_sparse.errors import UnsupportedCall, describe

from .module_call import attend, is_causal_call, refuse
from .packing import Visibility

# Up to transformers 5.18 continuous batching puts "paged|" before any name. From 5.19 on the prefix is
# taken off at each look-up, and models may name "paged|eager", "sdpa" and flash implementations only.
_PREFIXES_NAMES = "paged|sdpa" in ALL_ATTENTION_FUNCTIONS.valid_keys()

# What an attention module's configuration names during continuous batching, and what the model's does.
PAGED_NAME = "paged|modelopt_triton" if _PREFIXES_NAMES else "modelopt_triton_paged"
PAGED_MODEL_NAME = PAGED_NAME if _PREFIXES_NAMES else "paged|eager"

# The method of a model through which every way into continuous batching goes.
ENTRY = "init_continuous_batching"

# The arguments that say the longest of the requests' rows, "_q", and keys, "_k".
_LONGEST = "max_seqlen" if _PREFIXES_NAMES else "max_length"

# What continuous batching hands down to the attention function, for the model and for sampling.
_NOT_FOR_ATTENTION = frozenset({"logits_indices", "logits_processor_args"})


def register() -> None:
    """Makes the attention function of continuous batching known to transformers. May be called again.

    There is no mask function with it: lengths say which keys a row sees.
    """
    AttentionInterface.register(PAGED_NAME, paged_attention)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Mapping[str, Tensor] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool | None = None,
    cache: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | Mapping[str, Tensor] | None = None,
    read_index: list[Tensor] | None = None,
    write_index: list[Tensor] | None = None,
    block_table: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one module's call on a batch of requests, some in prefill and some in decode.

    Args:
        module: the attention module that calls; causal.
        query: [1, Hq, Tq, D]; key: [1, Hk, Tq, D]; value: [1, Hk, Tq, Dv]: the new tokens of all
            requests, end to end.
        attention_mask, is_causal: made for the implementation that the model names. They say what the
            lengths and `sliding_window` say, and aren't looked at.
        scaling, dropout, sliding_window, softcap, s_aux, output_attentions: see
            `hf.modelopt_triton_attention`.
        cache: transformers' PagedAttentionCache. It takes the new keys and values by `write_index`, and
            gives all those of the requests by `read_index`.
        cu_seq_lens_q, cu_seq_lens_k: cumulative lengths [requests + 1] of rows and keys; those of keys
            by layer type, where the cache has several. Rows are a request's last tokens.
        block_table: must be None.
        kwargs: max_seqlen_q and max_seqlen_k, or max_length_q and max_length_k, the longest of each;
            those of `module_call.HARMLESS_KWARGS`, and what is for sampling, are ignored.
    Returns:
        out [1, Tq, Hq, Dv], contiguous; and None for the weights.
    Raises:
        UnsupportedCall: no paged cache, or an argument that would change the result is not offered.
        ArgumentError: a shape or dtype is not taken.
    """
    max_q, max_k = (kwargs.pop(f"{_LONGEST}_{name}", None) for name in "qk")
    rest = {name: given for name, given in kwargs.items() if name not in _NOT_FOR_ATTENTION}
    refuse(dropout, output_attentions, rest)
    for name, given in (("cache", cache), ("cu_seq_lens_q", cu_seq_lens_q)):
        if given is None:
            remedy = "For other calls, leave modelopt_sparse.continuous_batching first."
            raise UnsupportedCall(describe(name, None, "what continuous batching gives", remedy))
    if block_table is not None:
        remedy = "Set max_blocks_per_request=0 in the ContinuousBatchingConfig."
        raise UnsupportedCall(describe("block_table", "a tensor", "None", remedy))
    if not is_causal_call(module, None):
        raise UnsupportedCall(describe("is_causal", False, "causal self-attention"))
    layer_type = _layer_type(cache, module)
    if layer_type == "sliding_attention" and sliding_window is None:
        takes = "the window by which the cache keeps keys"
        raise UnsupportedCall(describe("sliding_window", None, takes))
    place = {"read_index": read_index, "write_index": write_index}
    key, value, cu_seq_lens_k, max_k = _updated(
        cache, module, key, value, cu_seq_lens_k, max_k, place
    )
    if isinstance(cu_seq_lens_k, Mapping):
        cu_seq_lens_k, max_k = cu_seq_lens_k[layer_type], max_k[layer_type]
    visibility = Visibility(
        causal=True,
        cu_seq_lens_q=cu_seq_lens_q,
        cu_seq_lens_k=cu_seq_lens_k,
        max_length_q=max_q,
        max_length_k=max_k,
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


def refuse_continuous_batching(*args: object, **kwargs: object) -> NoReturn:
    """Stands in for a sparse model's `init_continuous_batching`, outside of `continuous_batching`.

    There transformers takes other attention, silently where FlashAttention is installed, or raises.

    Raises:
        UnsupportedCall: always.
    """
    got = "a sparse model outside of modelopt_sparse.continuous_batching"
    remedy = "with modelopt_sparse.continuous_batching(model): model.generate_batch(...)"
    raise UnsupportedCall(describe("continuous batching", got, "one inside of it", remedy))


def _layer_type(cache: Any, module: Any) -> str:
    """How the cache keeps the keys of this module: "full_attention", "sliding_attention" or another."""
    windows = getattr(cache, "sliding_windows", None)  # up to transformers 5.17
    if windows is not None:
        return "full_attention" if windows[module.layer_idx] == 1 else "sliding_attention"
    keeper = cache.layer_to_allocator[module.layer_idx]
    return next(str(name) for name, each in cache.cache_allocators.items() if each is keeper)


def _updated(
    cache: Any,
    module: Any,
    key: Tensor,
    value: Tensor,
    cu_seq_lens_k: Any,
    max_k: Any,
    place: dict[str, Any],
) -> tuple[Tensor, Tensor, Any, Any]:
    """Stores new keys and values, and returns all those of the requests, [1, Hk, keys, D], and their lengths.

    From transformers 5.19 on the cache picks the lengths of the module's layer type; before, they stay.
    """
    if _PREFIXES_NAMES:
        # [keys, Hk, D] each.
        key, value = cache.update(key, value, layer_idx=module.layer_idx, **place)
        return key.transpose(0, 1)[None], value.transpose(0, 1)[None], cu_seq_lens_k, max_k
    given = place | {"cu_seq_lens_k": cu_seq_lens_k, "max_length_k": max_k}
    key, value = cache.update(key, value, layer_idx=module.layer_idx, kwargs=given)
    return key, value, given["cu_seq_lens_k"], given["max_length_k"]

"""The kernels as `torch.library` operators: what autograd and torch.compile see of them.

An operator takes tensors and numbers only, so a call is taken apart into them and put together again inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modelopt_sparse.errors import UnsupportedCall, describe

from .arguments import first_bin
from .backward import backward
from .check import FP8, Call
from .flat import flatten, unflatten
from .forward import forward
from .results import Results, allocate
from .types import (
    AttentionOutput,
    SkipSoftmax,
    SkipSoftmaxDecode,
    TileCounts,
    TileMap,
)

# What `attention_forward` returns: the tensors of `Results`, empty where there is none.
_Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def run(call: Call) -> AttentionOutput:
    """Computes a checked call with the Triton kernels.

    Raises:
        UnsupportedCall: they don't offer it.
    """
    if call.q.dtype == torch.float64:
        remedy = "Use attention_reference (backend 'pytorch')."
        takes = "float16, bfloat16 or float32 in the Triton kernels"
        raise UnsupportedCall(describe("q", "torch.float64", takes, remedy))
    if call.k.dtype == FP8 and not _has_fp8(call.q.device):
        remedy = "Keep the cache in the dtype of the queries, or use attention_reference."
        takes = "a GPU of compute capability 8.9 or above for keys in 8 bits"
        raise UnsupportedCall(describe("k", f"{call.k.dtype} on {call.k.device}", takes, remedy))
    given, call = call, _with_positive_scale(call)
    bias = None if call.bias is None else call.bias.values
    differentiable = (call.q, call.k, call.v, call.sinks, bias)
    wants_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in differentiable
    )
    if wants_grad or torch.compiler.is_compiling():
        found = attention_forward(*flatten(call), wants_grad)
        results = Results(*(x if x.numel() else None for x in found))  # type: ignore[arg-type]
        results = results._replace(out=found[0], lse=found[1])
    else:
        results = forward(call, keep_tiles=False)
    return _output(given, results)


def _has_fp8(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9)


def _with_positive_scale(call: Call) -> Call:
    """The same scores: kernels compare them unscaled, so their factor must be above 0."""
    assert call.scale is not None
    if call.scale > 0:
        return call
    return call._replace(q=-call.q if call.scale else call.q * 0, scale=-call.scale or 1.0)


def _output(call: Call, results: Results) -> AttentionOutput:
    skip, decode, tiles = call.plan.skip, call.plan.skip_decode, call.plan.tiles
    decode_tiles = None
    if call.details and skip is not None and results.words is not None:
        tiles = TileMap(
            results.words, call.seqs, call.causal, skip.block_rows, skip.block_keys, call.phase
        )
    if call.details and decode is not None and results.decode_words is not None:
        decode_tiles = TileMap(
            results.decode_words, call.seqs, call.causal, None, decode.block_keys, call.phase
        )

    def detached(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach()

    return AttentionOutput(
        out=results.out,
        lse=results.lse,
        prefill=_counts(results.prefill, skip),
        decode=_counts(results.decode, decode),
        tiles=tiles if call.details else None,
        decode_tiles=decode_tiles,
        dropped_mass=detached(results.dropped) if call.details else None,
        dropped_mass_bound=detached(results.bound),
    )


def _counts(
    counts: Tensor | None, skip: SkipSoftmax | SkipSoftmaxDecode | None
) -> TileCounts | None:
    if counts is None or skip is None:
        return None
    histogram = counts[first_bin(skip) :] if skip.histogram else None
    return TileCounts(counts[0], counts[1 : 2 + len(skip.count_thresholds)], histogram)


@torch.library.custom_op("modelopt_sparse::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None,
    tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float], keep_tiles: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """A checked call; see `FlatCall`. `keep_tiles`: decisions are wanted for the backward pass.

    Returns:
        the tensors of `Results`, empty where there is none.
    """
    call = unflatten(q, k, v, sinks, bias, tensors, ints, floats)
    return _present(call, forward(call, keep_tiles))


def _present(call: Call, results: Results) -> _Tensors:
    def present(x: Tensor | None, dtype: torch.dtype) -> Tensor:
        return call.q.new_empty(0, dtype=dtype) if x is None else x

    return (
        results.out,
        results.lse,
        present(results.prefill, torch.int64),
        present(results.decode, torch.int64),
        present(results.words, torch.int32),
        present(results.decode_words, torch.int32),
        present(results.dropped, torch.float32),
        present(results.bound, torch.float32),
    )


@attention_forward.register_fake
def _(*arguments: Any) -> _Tensors:
    call = unflatten(*arguments[:-1])
    return _present(call, allocate(call, arguments[-1]))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, lse, _, _, words, decode_words, _, _ = output
    q, k, v, sinks, bias, tensors, ctx.ints, ctx.floats, _ = inputs
    ctx.save_for_backward(out, lse, words, decode_words, q, k, v, sinks, bias, *tensors)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    out, lse, words, decode_words, *leaves = ctx.saved_tensors
    leaves, tensors = leaves[:5], leaves[5:]
    # Of the list of tensors, the numbers and `keep_tiles`.
    none = [None] * len(tensors), None, None, None
    if d_out is None and d_lse is None:
        return (*[None] * 5, *none)
    d_out = torch.zeros_like(out) if d_out is None else d_out
    wants_bias = ctx.needs_input_grad[4]
    d_q, d_k, d_v, d_sinks, d_bias = attention_backward(
        *leaves, tensors, ctx.ints, ctx.floats, out, lse, words, decode_words, d_out, d_lse, wants_bias
    )  # fmt: skip
    d_sinks = None if leaves[3] is None else d_sinks
    return d_q, d_k, d_v, d_sinks, d_bias if wants_bias else None, *none


attention_forward.register_autograd(_differentiate, setup_context=_remember)


@torch.library.custom_op("modelopt_sparse::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None,
    tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float],
    out: Tensor, lse: Tensor, words: Tensor, decode_words: Tensor,
    d_out: Tensor, d_lse: Tensor | None, wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, sinks and bias of what the forward pass did, by its decisions.

    Args:
        words, decode_words: decisions of the forward pass; empty where it made none.
    Returns:
        d_q, d_k, d_v; d_sinks and d_bias, empty where there is none.
    """
    call = unflatten(q, k, v, sinks, bias, tensors, ints, floats)
    skip, decode, given, in_decode = call.plan.skip, call.plan.skip_decode, call.plan.tiles, None
    if skip is not None and skip.threshold is not None:
        size = skip.block_rows, skip.block_keys
        given = TileMap(words, call.seqs, call.causal, *size, call.phase)
    if decode is not None and decode.threshold is not None:
        in_decode = TileMap(
            decode_words, call.seqs, call.causal, None, decode.block_keys, call.phase
        )
    d_q, d_k, d_v, d_sinks, d_bias = backward(
        call, out, lse, d_out, d_lse, given, in_decode, wants_bias
    )
    d_sinks = q.new_empty(0) if d_sinks is None else d_sinks
    return d_q, d_k, d_v, d_sinks, q.new_empty(0) if d_bias is None else d_bias


@attention_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None) -> Tensor:
        if x is None:
            return q.new_empty(0)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    wants_bias = arguments[-1]
    return like(q), like(k), like(v), like(sinks), like(bias if wants_bias else None)


def _twice(ctx: Any, *gradients: Any) -> Any:
    got = "a gradient of a gradient"
    remedy = "Use attention_reference (backend 'pytorch') for second derivatives."
    raise UnsupportedCall(describe("backward", got, "first derivatives", remedy))


attention_backward.register_autograd(_twice, setup_context=lambda ctx, inputs, output: None)

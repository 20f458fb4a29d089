"""The kernels as `torch.library` operators: what autograd and torch.compile see of them.

An operator takes tensors and numbers only, so a call is spread out into them and put together again inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from modelopt_sparse.errors import UnsupportedCall, describe

from .backward import backward
from .check import Call
from .forward import forward
from .results import Results, allocate
from .types import (
    AttentionOutput,
    NMSparsity,
    Phase,
    Plan,
    ScoreGrid,
    Seqs,
    SkipSoftmax,
    SkipSoftmaxDecode,
    TileCounts,
    TileMap,
)

_PHASES = (None, Phase.PREFILL, Phase.DECODE)
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
    given, call = call, _with_positive_scale(call)
    bias = None if call.bias is None else call.bias.values
    differentiable = (call.q, call.k, call.v, call.sinks, bias)
    wants_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in differentiable
    )
    if wants_grad or torch.compiler.is_compiling():
        found = attention_forward(*_spread(call), wants_grad)
        results = Results(*(x if x.numel() else None for x in found))  # type: ignore[arg-type]
        results = replace(results, out=found[0], lse=found[1])
    else:
        results = forward(call, keep_tiles=False)
    return _output(given, results)


def _with_positive_scale(call: Call) -> Call:
    """The same scores: kernels compare them unscaled, so their factor must be above 0."""
    assert call.scale is not None
    if call.scale > 0:
        return call
    return replace(call, q=-call.q if call.scale else call.q * 0, scale=-call.scale or 1.0)


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
    return TileCounts(counts[0], counts[1 : 2 + len(skip.count_thresholds)])


def _spread(call: Call) -> tuple[Any, ...]:
    """The arguments of `attention_forward` but for the last."""
    seqs, plan = call.seqs, call.plan
    nm, skip, decode, tiles = plan.nm, plan.skip, plan.skip_decode, plan.tiles

    def threshold(part: SkipSoftmax | SkipSoftmaxDecode | None) -> tuple[Any, ...]:
        value = None if part is None else part.threshold
        if isinstance(value, float) and torch.compiler.is_compiling():
            # A number would be a constant of the graph, which other numbers would compile again.
            value = torch.full((), value, dtype=torch.float64, device=call.q.device)
        counted = [] if part is None else list(part.count_thresholds)
        return (None, value, counted) if isinstance(value, Tensor) else (value, None, counted)

    def grid(scores: ScoreGrid | None) -> tuple[Tensor | None, ...]:
        if scores is None:
            return None, None, None
        return scores.values, scores.row_start, scores.key_start

    return (
        call.q, call.k, call.v, seqs.q_start, seqs.q_len, seqs.k_start, seqs.k_len, seqs.max_q, seqs.max_k,
        call.causal, call.scale, call.window, call.softcap, call.sinks, call.bounds,
        *grid(call.mask), *grid(call.bias), _PHASES.index(call.phase), call.details,
        [] if nm is None else [nm.n, nm.m, nm.num_sink_tokens, nm.dense_window_size],
        [] if skip is None else [skip.block_rows, skip.block_keys, int(skip.exact_normalizer)],
        *threshold(skip),
        [] if decode is None else [
            decode.block_keys, decode.segment_keys, int(decode.vote_per_head), int(decode.exact_normalizer)
        ],
        *threshold(decode),
        None if tiles is None else tiles.words,
        [] if tiles is None else [tiles.block_rows, tiles.block_keys],
    )  # fmt: skip


def _gathered(
    q: Tensor, k: Tensor, v: Tensor,
    q_start: Tensor, q_len: Tensor, k_start: Tensor, k_len: Tensor, max_q: int, max_k: int,
    causal: bool, scale: float, window: int | None, softcap: float | None,
    sinks: Tensor | None, bounds: Tensor | None,
    mask: Tensor | None, mask_rows: Tensor | None, mask_keys: Tensor | None,
    bias: Tensor | None, bias_rows: Tensor | None, bias_keys: Tensor | None,
    phase: int, details: bool, nm: Sequence[int],
    skip: Sequence[int], skip_threshold: float | None, skip_thresholds: Tensor | None,
    skip_counted: Sequence[float],
    decode: Sequence[int], decode_threshold: float | None, decode_thresholds: Tensor | None,
    decode_counted: Sequence[float],
    words: Tensor | None, tiles: Sequence[int],
) -> Call:  # fmt: skip
    """The call that `_spread` spread out."""
    seqs = Seqs(q_start, q_len, k_start, k_len, max_q, max_k)
    in_phase = _PHASES[phase]
    skip_value = skip_threshold if skip_thresholds is None else skip_thresholds
    decode_value = decode_threshold if decode_thresholds is None else decode_thresholds
    in_prefill = in_decode = given = None
    if skip:
        rows, keys, exact = skip
        in_prefill = SkipSoftmax(skip_value, rows, keys, tuple(skip_counted), bool(exact))
    if decode:
        keys, segment, per_head, exact = decode
        in_decode = SkipSoftmaxDecode(
            decode_value, keys, segment, bool(per_head), tuple(decode_counted), bool(exact)
        )
    if words is not None:
        rows, keys = tiles
        given = TileMap(words, seqs, causal, rows, keys, in_phase)
    plan = Plan(NMSparsity(*nm) if nm else None, in_prefill, in_decode, given)
    return Call(
        q, k, v, seqs, plan, causal, scale, window, softcap, sinks, bounds,
        None if mask is None else ScoreGrid(mask, mask_rows, mask_keys),
        None if bias is None else ScoreGrid(bias, bias_rows, bias_keys),
        in_phase, details,
    )  # fmt: skip


@torch.library.custom_op("modelopt_sparse::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor,
    q_start: Tensor, q_len: Tensor, k_start: Tensor, k_len: Tensor, max_q: int, max_k: int,
    causal: bool, scale: float, window: int | None, softcap: float | None,
    sinks: Tensor | None, bounds: Tensor | None,
    mask: Tensor | None, mask_rows: Tensor | None, mask_keys: Tensor | None,
    bias: Tensor | None, bias_rows: Tensor | None, bias_keys: Tensor | None,
    phase: int, details: bool, nm: Sequence[int],
    skip: Sequence[int], skip_threshold: float | None, skip_thresholds: Tensor | None,
    skip_counted: Sequence[float],
    decode: Sequence[int], decode_threshold: float | None, decode_thresholds: Tensor | None,
    decode_counted: Sequence[float],
    words: Tensor | None, tiles: Sequence[int], keep_tiles: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """A checked call, spread out; see `Call`. `keep_tiles`: decisions are wanted for the backward pass.

    Returns:
        the tensors of `Results`, empty where there is none.
    """
    call = _gathered(
        q, k, v, q_start, q_len, k_start, k_len, max_q, max_k, causal, scale, window, softcap, sinks, bounds,
        mask, mask_rows, mask_keys, bias, bias_rows, bias_keys, phase, details, nm,
        skip, skip_threshold, skip_thresholds, skip_counted,
        decode, decode_threshold, decode_thresholds, decode_counted, words, tiles,
    )  # fmt: skip
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
    call = _gathered(*arguments[:-1])
    return _present(call, allocate(call, arguments[-1]))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, lse, _, _, words, decode_words, _, _ = output
    tensors = [x if isinstance(x, Tensor) else None for x in inputs]
    ctx.save_for_backward(out, lse, words, decode_words, *tensors)
    ctx.numbers = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    out, lse, words, decode_words, *tensors = ctx.saved_tensors
    inputs = [n if t is None else t for t, n in zip(tensors, ctx.numbers, strict=True)]
    call = _gathered(*inputs[:-1])
    gradients: list[Tensor | None] = [None] * len(inputs)
    if d_out is None and d_lse is None:
        return tuple(gradients)
    d_out = torch.zeros_like(out) if d_out is None else d_out
    found = attention_backward(
        *inputs[:-1], out, lse, words, decode_words, d_out, d_lse, ctx.needs_input_grad[_BIAS]
    )
    d_q, d_k, d_v, d_sinks, d_bias = found
    gradients[:3] = [d_q, d_k, d_v]
    if call.sinks is not None:
        gradients[_SINKS] = d_sinks
    if ctx.needs_input_grad[_BIAS]:
        gradients[_BIAS] = d_bias
    return tuple(gradients)


# Places of arguments of `attention_forward`.
_SINKS, _BIAS = 13, 18


attention_forward.register_autograd(_differentiate, setup_context=_remember)


@torch.library.custom_op("modelopt_sparse::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor,
    q_start: Tensor, q_len: Tensor, k_start: Tensor, k_len: Tensor, max_q: int, max_k: int,
    causal: bool, scale: float, window: int | None, softcap: float | None,
    sinks: Tensor | None, bounds: Tensor | None,
    mask: Tensor | None, mask_rows: Tensor | None, mask_keys: Tensor | None,
    bias: Tensor | None, bias_rows: Tensor | None, bias_keys: Tensor | None,
    phase: int, details: bool, nm: Sequence[int],
    skip: Sequence[int], skip_threshold: float | None, skip_thresholds: Tensor | None,
    skip_counted: Sequence[float],
    decode: Sequence[int], decode_threshold: float | None, decode_thresholds: Tensor | None,
    decode_counted: Sequence[float],
    given: Tensor | None, tiles: Sequence[int],
    out: Tensor, lse: Tensor, words: Tensor, decode_words: Tensor,
    d_out: Tensor, d_lse: Tensor | None, bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, sinks and bias of what the forward pass did, by its decisions.

    Args:
        words, decode_words: decisions of the forward pass; empty where it made none.
    Returns:
        d_q, d_k, d_v; d_sinks and d_bias, empty where there is none.
    """
    call = _gathered(
        q, k, v, q_start, q_len, k_start, k_len, max_q, max_k, causal, scale, window, softcap, sinks, bounds,
        mask, mask_rows, mask_keys, bias, bias_rows, bias_keys, phase, details, nm,
        skip, skip_threshold, skip_thresholds, skip_counted,
        decode, decode_threshold, decode_thresholds, decode_counted, given, tiles,
    )  # fmt: skip
    in_phase, prefill, in_decode = _PHASES[phase], call.plan.tiles, None
    if skip and (skip_threshold is not None or skip_thresholds is not None):
        prefill = TileMap(words, call.seqs, causal, skip[0], skip[1], in_phase)
    if decode and (decode_threshold is not None or decode_thresholds is not None):
        in_decode = TileMap(decode_words, call.seqs, causal, None, decode[0], in_phase)
    d_q, d_k, d_v, d_sinks, d_bias = backward(
        call, out, lse, d_out, d_lse, prefill, in_decode, bias_gradient
    )
    d_sinks = q.new_empty(0) if d_sinks is None else d_sinks
    return d_q, d_k, d_v, d_sinks, q.new_empty(0) if d_bias is None else d_bias


@attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    sinks, bias, bias_gradient = arguments[_SINKS - 3], arguments[_BIAS - 3], arguments[-1]
    contiguous = torch.contiguous_format
    d_q, d_k, d_v = (torch.empty_like(x, memory_format=contiguous) for x in (q, k, v))
    d_sinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    d_bias = torch.empty_like(bias, memory_format=contiguous) if bias_gradient else q.new_empty(0)
    return d_q, d_k, d_v, d_sinks, d_bias


def _twice(ctx: Any, *gradients: Any) -> Any:
    got = "a gradient of a gradient"
    remedy = "Use attention_reference (backend 'pytorch') for second derivatives."
    raise UnsupportedCall(describe("backward", got, "first derivatives", remedy))


attention_backward.register_autograd(_twice, setup_context=lambda ctx, inputs, output: None)

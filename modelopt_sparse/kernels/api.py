"""The public kernel functions: check the arguments, run, return."""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from modelopt_sparse.errors import ArgumentError, ArgumentTypeError, UnsupportedCall, describe

from .backends import run, run_reference, run_triton
from .check import Call, checked
from .check_values import check_int, check_number
from .pages import PagedKV
from .types import (
    DENSE,
    AttentionOutput,
    NMSparsity,
    Phase,
    Plan,
    ScoreGrid,
    Seqs,
    SkipSoftmax,
    SkipSoftmaxDecode,
)


class AttentionOptions(TypedDict, total=False):
    """The keyword arguments of `attention_varlen`."""

    causal: bool
    scale: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    bounds: Tensor | None
    mask: ScoreGrid | None
    bias: ScoreGrid | None
    phase: Phase | None
    plan: Plan
    details: bool


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqs: Seqs,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bounds: Tensor | None = None,
    mask: ScoreGrid | None = None,
    bias: ScoreGrid | None = None,
    phase: Phase | None = None,
    plan: Plan = DENSE,
    details: bool = False,
) -> AttentionOutput:
    """Softmax attention over packed sequences, with optional N:M sparsity and tile skipping.

    On a GPU by Triton kernels, without waiting for it; on a CPU by the torch reference.

    Args:
        q: [Tq, Hq, D] fp16, bf16, fp32 or fp64, last dim contiguous.
        k: [Tk, Hk, D], same dtype and device. Hq % Hk == 0: head h reads k[:, h // (Hq // Hk)].
        v: [Tk, Hk, Dv], same dtype and device.
        seqs: where each sequence lies. See `Seqs`.
        causal: row i of a sequence sits at position p = n_k - n_q + i and sees keys j <= p. False: p = i
            and every key of the sequence is visible.
        scale: multiplies q·k, natural-log units; default D ** -0.5.
        window: causal only; a row sees keys j > p - window.
        softcap: scores become softcap * tanh(score / softcap), natural-log units.
        sinks: [Hq] logits, natural-log units, that join the softmax's denominator.
        bounds: int32 [Tq, 2]; a row sees keys [start, end) of its own sequence, clipped to it, in place
            of what `causal` and `window` would show. Positions still follow `causal`.
        mask: bool grid; False hides a key, on top of the above.
        bias: float grid, added to the scores after softcap, natural-log units; -inf hides a key.
        phase: the phase of every sequence; default: n_q == 1 decodes, every other prefills.
        plan: what to leave out; see `Plan`.
        details: also return the decisions (`tiles`, `decode_tiles`, `kept`) and `dropped_mass`.
    Returns:
        AttentionOutput: out [Tq, Hq, Dv] in q's dtype; lse [Tq, Hq], base 2; tile counts.
    Raises:
        ArgumentError, ArgumentTypeError: a rule above is broken (a ValueError, a TypeError); names the
            argument, what it got, what it takes.
        UnsupportedCall: valid, but not offered here. Never falls back.
    Numerics: accumulates in fp32, in fp64 for fp64 input. On CUDA fp32 products are IEEE unless
        `torch.set_float32_matmul_precision` has chosen TF32, which rounds the scores that decide.
        Differentiable in q, k, v, sinks and bias; the gradient is that of the tiles that the forward kept.
    Source: FlashAttention-2 (arXiv 2307.08691); skip rule: BLASST (arXiv 2512.12087).
    """
    call = Call(
        q,
        k,
        v,
        seqs,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        bounds=bounds,
        mask=mask,
        bias=bias,
        phase=phase,
        plan=plan,
        details=details,
    )
    return run(checked(call))


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, seqs: Seqs, **options: Unpack[AttentionOptions]
) -> AttentionOutput:
    """`attention_varlen` by the torch reference, on any device. Arguments and errors are the same."""
    return run_reference(packed_call(q, k, v, seqs, options))


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, seqs: Seqs, **options: Unpack[AttentionOptions]
) -> AttentionOutput:
    """`attention_varlen` by the Triton kernels: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1).

    Raises:
        UnsupportedCall: there is no Triton, or it can't run on this device; else as `attention_varlen`.
    """
    return run_triton(packed_call(q, k, v, seqs, options))


def attention_paged(
    q: Tensor, cache: PagedKV, seqs: Seqs, **options: Unpack[AttentionOptions]
) -> AttentionOutput:
    """`attention_varlen` on keys and values in pages. Forward only.

    What comes back doesn't depend on the page size, nor on where pages lie.

    Args:
        q: [Tq, Hq, D], as for `attention_varlen`.
        cache: keys and values, and where each sequence's pages are; see `PagedKV`.
        seqs: `q_start`, `q_len` and `k_len` of each sequence. `k_start` isn't read.
        options: as for `attention_varlen`.
    Returns:
        AttentionOutput: as `attention_varlen`.
    Raises:
        ArgumentError, ArgumentTypeError, UnsupportedCall: as for `attention_varlen`; UnsupportedCall also
            where a gradient is wanted. On a GPU lengths and tables aren't looked into: see `PagedKV.check`.
    """
    call = paged_call(q, cache, seqs, options)
    bias = None if call.bias is None else call.bias.values
    wants_grad = any(
        x is not None and x.requires_grad for x in (q, call.k, call.v, call.sinks, bias)
    )
    if torch.is_grad_enabled() and wants_grad:
        remedy = "Call it under torch.no_grad(), or attention_varlen on packed keys."
        got, takes = "a tensor that wants a gradient", "tensors that don't"
        raise UnsupportedCall(describe("attention_paged", got, takes, remedy))
    return run(call)


def paged_call(q: Tensor, cache: PagedKV, seqs: Seqs, options: AttentionOptions) -> Call:
    """What `attention_paged` runs, checked."""
    if not isinstance(cache, PagedKV):
        raise ArgumentTypeError(describe("cache", repr(cache), "a PagedKV"))
    options.setdefault("plan", DENSE)
    k_scale = check_number("cache.k_scale", cache.k_scale)
    v_scale = check_number("cache.v_scale", cache.v_scale)
    more: dict[str, Any] = {"block_tables": cache.block_tables, "v_scale": v_scale}
    call = checked(Call(q, cache.k, cache.v, seqs, **more, **options))
    if k_scale != 1:
        assert call.scale is not None
        call = call._replace(scale=call.scale * k_scale)
    return call


def packed_call(q: Tensor, k: Tensor, v: Tensor, seqs: Seqs, options: AttentionOptions) -> Call:
    """What `attention_varlen` runs, checked."""
    options.setdefault("plan", DENSE)
    return checked(Call(q, k, v, seqs, **options))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b_start_loc: Tensor,
    b_seq_len: Tensor,
    max_input_len: int,
    is_causal: bool = True,
    softmax_scale: float | None = None,
    b_start_loc_k: Tensor | None = None,
    b_seq_len_k: Tensor | None = None,
    max_input_len_k: int | None = None,
    *,
    sparsity_n: int = 0,
    sparsity_m: int = 4,
    num_sink_tokens: int = 0,
    dense_window_size: int = 64,
    skip_softmax_threshold: float | Tensor | None = None,
) -> Tensor:
    """Packed attention by starts and lengths, with N:M sparsity and skip-softmax.

    Args:
        q: [total_q, Hq, D]; k: [total_k, Hk, D]; v: [total_k, Hk, Dv], as for `attention_varlen`.
        b_start_loc, b_seq_len: int32 [B], first row and number of rows of each sequence.
        max_input_len: the longest of `b_seq_len`, in tokens.
        is_causal: the rows of a sequence are its last positions; row at p sees keys j <= p.
        softmax_scale: multiplies q·k, natural-log units; default D ** -0.5.
        b_start_loc_k, b_seq_len_k, max_input_len_k: the same for the keys; all three or none.
        sparsity_n: keys that stay of every `sparsity_m`; 0 is dense. Sequences that decode stay dense.
        num_sink_tokens, dense_window_size: keys that N:M never drops; need `sparsity_n`.
        skip_softmax_threshold: lambda. A sequence of one row follows the decode rule, others prefill.
    Returns:
        [total_q, Hq, Dv] in the dtype of q.
    Raises:
        ArgumentError, ArgumentTypeError, UnsupportedCall: as for `attention_varlen`.
    """
    if b_start_loc_k is None or b_seq_len_k is None or max_input_len_k is None:
        keys = {
            "b_start_loc_k": b_start_loc_k,
            "b_seq_len_k": b_seq_len_k,
            "max_input_len_k": max_input_len_k,
        }
        missing = [name for name, value in keys.items() if value is None]
        if len(missing) < len(keys):
            raise ArgumentError(describe(missing[0], "None", f"all of {', '.join(keys)}, or none"))
        b_start_loc_k, b_seq_len_k, max_input_len_k = b_start_loc, b_seq_len, max_input_len
    plan = Plan(
        nm=_nm(sparsity_n, sparsity_m, num_sink_tokens, dense_window_size),
        skip=None if skip_softmax_threshold is None else SkipSoftmax(skip_softmax_threshold),
        skip_decode=(
            None if skip_softmax_threshold is None else SkipSoftmaxDecode(skip_softmax_threshold)
        ),
    )
    seqs = Seqs(b_start_loc, b_seq_len, b_start_loc_k, b_seq_len_k, max_input_len, max_input_len_k)
    try:
        output = attention_varlen(q, k, v, seqs, causal=is_causal, scale=softmax_scale, plan=plan)
    except (ArgumentError, ArgumentTypeError) as error:
        raise type(error)(_in_own_names(str(error))) from None
    return output.out


# What `attention_varlen` calls the arguments of `attention`.
_OWN_NAMES = {
    "seqs.q_start": "b_start_loc",
    "seqs.q_len": "b_seq_len",
    "seqs.max_q": "max_input_len",
    "seqs.k_start": "b_start_loc_k",
    "seqs.k_len": "b_seq_len_k",
    "seqs.max_k": "max_input_len_k",
    "causal": "is_causal",
    "scale": "softmax_scale",
    "n": "sparsity_n",
    "m": "sparsity_m",
    "threshold": "skip_softmax_threshold",
}


def _in_own_names(message: str) -> str:
    name, _, rest = message.partition(": ")
    message = f"{_OWN_NAMES.get(name, name)}: {rest}"
    for theirs, own in _OWN_NAMES.items():
        if theirs.startswith("seqs."):
            message = message.replace(theirs, own)
    return message


def _nm(n: int, m: int, num_sink_tokens: int, dense_window_size: int) -> NMSparsity | None:
    check_int("sparsity_n", n, least=0)
    if check_int("sparsity_m", m) not in (4, 8):
        raise ArgumentError(describe("sparsity_m", m, "4 or 8"))
    if n:
        return NMSparsity(n, m, num_sink_tokens, dense_window_size)
    for name, value, default in (
        ("num_sink_tokens", num_sink_tokens, 0),
        ("dense_window_size", dense_window_size, 64),
    ):
        if check_int(name, value, least=0) != default:
            takes = f"{default} without sparsity_n"
            raise ArgumentError(describe(name, value, takes, "It shields keys from N:M only."))
    return None

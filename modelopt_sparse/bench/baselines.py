"""What we are measured against: the kernels behind PyTorch's attention; Model-Optimizer's, FlashInfer's if
installed.

Each function makes the tensors that its peer wants, outside of what is timed, runs it once, and returns what
to time; or raises `Unavailable`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from .inputs import LATENT, Inputs
from .timing import Run, Times

MODELOPT = ("modelopt.torch.kernels.common.attention", "modelopt.torch.kernels")
"""Where its releases keep the kernel, the newest first."""
WORKSPACE_BYTES = 2**28
"""What FlashInfer's planning is given: twice what it asks for."""

COPY, PRODUCT = "copy of as many bytes", "product of as many operations"
"""What takes no less time than a kernel that reads as many bytes, or multiplies as much: its roofline."""


class Unavailable(Exception):
    """A peer that can't run this here, and why."""


@dataclass(frozen=True, eq=False)
class Peer:
    """A peer, ready to be timed.

    Args:
        output: computes [T, Hq, D], to be checked; None if its result is defined otherwise than ours.
        note: what the reader should know of how it is run.
        compare: the note that follows from our times and its own.
        is_rival: it computes what a user would choose in place of ours; else it is a bound, or a part.
    """

    run: Run
    output: Callable[[], Tensor] | None = None
    note: str = ""
    compare: Callable[[Times, Times], str] | None = None
    is_rival: bool = True


def copy_of(size: int, device: torch.device) -> Peer:
    """Reads half as many bytes, and writes them."""
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Peer(partial(target.copy_, source), is_rival=False)


def product_of(flops: float, device: torch.device, dtype: torch.dtype) -> Peer:
    """A product of square matrices of random numbers: ones take less power, and so less time."""
    size = max(16, round((flops / 2) ** (1 / 3) / 128) * 128)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return Peer(partial(torch.mm, a, b), is_rival=False)


def sdpa(inputs: Inputs, backend: SDPBackend | None, mode: str = "forward") -> Peer:
    """PyTorch's attention by one backend, or by whichever it picks (None).

    Sequences are calls of their own. Heads are shared natively where the backend can, else KV heads are
    repeated beforehand.

    Args:
        mode: "forward"; "backward", the backward pass alone; "both".
    """
    reasons = []
    for native in [True, False] if inputs.group > 1 else [False]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # why each other backend was not taken
                peer = _sdpa(inputs, backend, mode, native)
                peer.run()
                return peer
        except RuntimeError as error:
            reasons.append(str(error).strip().splitlines()[0])
    raise Unavailable("; ".join(reasons))


def _sdpa(inputs: Inputs, backend: SDPBackend | None, mode: str, native: bool) -> Peer:
    def alone(x: Tensor, span: slice) -> Tensor:
        """One sequence in the layout that it documents: [1, H, n, D]."""
        return x[span].detach().transpose(0, 1)[None].contiguous()

    k, v = inputs.k, inputs.v
    if not native:
        k, v = (x.repeat_interleave(inputs.group, 1) for x in (k, v))
    calls = [(alone(inputs.q, s), alone(k, s), alone(v, s)) for s in inputs.spans]
    if mode != "forward":
        for x in chain.from_iterable(calls):
            x.requires_grad_()

    def forward() -> list[Tensor]:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return [
                scaled_dot_product_attention(q, k, v, is_causal=inputs.causal, enable_gqa=native)
                for q, k, v in calls
            ]

    def backward(outs: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        return [
            torch.autograd.grad(out, call, d_out, retain_graph=True)
            for out, call, d_out in zip(outs, calls, d_outs, strict=True)
        ]

    def output() -> Tensor:
        return torch.cat([out.detach()[0].transpose(0, 1) for out in forward()])

    notes = ["KV heads repeated"] if not native and inputs.group > 1 else []
    notes += ["one call a sequence"] if len(calls) > 1 else []
    note = ", ".join(notes)
    if mode == "forward":
        return Peer(forward, output, note)
    outs = forward()
    d_outs = [torch.randn_like(out) for out in outs]
    if mode == "backward":
        return Peer(lambda: backward(outs), output, note)
    return Peer(lambda: backward(forward()), output, note)


def flex(inputs: Inputs) -> Peer:
    """PyTorch's FlexAttention with a causal block mask, compiled for this length. One sequence."""
    (length,) = inputs.lengths
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (inputs.q, inputs.k, inputs.v))

    def is_seen(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return row >= key

    try:
        # It ships no types for what it returns.
        module: Any = import_module("torch.nn.attention.flex_attention")
        mask = module.create_block_mask(is_seen, None, None, length, length, device=q.device)
        function = torch.compile(module.flex_attention, dynamic=False)
        call = partial(function, q, k, v, block_mask=mask, enable_gqa=inputs.group > 1)
        call()
    except Exception as error:  # its compiler's errors are many
        raise Unavailable(f"FlexAttention: {type(error).__name__}: {error}") from error

    def output() -> Tensor:
        out: Tensor = call()
        return out[0].transpose(0, 1)

    return Peer(call, output)


def sdpa_chunk(inputs: Inputs, rows: int, backend: SDPBackend | None) -> Peer:
    """The last rows of one sequence by PyTorch's attention; of its backends FlashAttention-2 offers it."""
    q, k, v = (x.transpose(0, 1)[None] for x in (inputs.q[-rows:], inputs.k, inputs.v))
    native = inputs.group == 1
    if not native:
        k, v = (x.repeat_interleave(inputs.group, 1) for x in (k, v))
    is_seen = causal_lower_right(rows, k.shape[2])

    def run() -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, attn_mask=is_seen)

    try:
        run()
    except RuntimeError as error:
        raise Unavailable(str(error).strip().splitlines()[0]) from error
    return Peer(run, lambda: run()[0].transpose(0, 1), "" if native else "KV heads repeated")


def flash_varlen(inputs: Inputs) -> Peer:
    """FlashAttention-2 over packed sequences, as PyTorch carries it."""
    try:
        function: Callable[..., Any] = import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError as error:
        raise Unavailable(f"PyTorch {torch.__version__} has no varlen_attn") from error
    takes = inspect.signature(function).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
    )
    q, k, v = inputs.q, inputs.k, inputs.v
    native = inputs.group == 1 or "enable_gqa" in takes
    if not native:
        k, v = (x.repeat_interleave(inputs.group, 1) for x in (k, v))
    elif inputs.group > 1:
        options["enable_gqa"] = True
    ends = torch.tensor([0, *inputs.lengths], device=q.device).cumsum(0).int()
    most = max(inputs.lengths)

    def run() -> Tensor:
        out: Tensor = function(q, k, v, ends, ends, most, most, **options)
        return out

    try:
        run()
    except (RuntimeError, NotImplementedError) as error:
        raise Unavailable(str(error).strip().splitlines()[0]) from error
    return Peer(run, run, "" if native else "KV heads repeated")


def modelopt(inputs: Inputs, n: int = 0, m: int = 4) -> Peer:
    """Model-Optimizer's Triton kernel, dense (n = 0) or with N:M sparsity and its default dense window."""
    function = _modelopt_attention()
    seqs = inputs.seqs

    def run() -> Tensor:
        out: Tensor = function(
            inputs.q,
            inputs.k,
            inputs.v,
            seqs.q_start,
            seqs.q_len,
            seqs.max_q,
            is_causal=True,
            softmax_scale=inputs.q.shape[-1] ** -0.5,
            sparsity_n=n,
            sparsity_m=m,
        )
        return out

    try:
        run()
    except Exception as error:  # foreign code: whatever it raises is a reason
        raise Unavailable(f"Model-Optimizer: {type(error).__name__}: {error}") from error
    if n:
        return Peer(run, None, "its result was not checked")
    return Peer(run, run)


def flashinfer_latent(q: Tensor, pages: Tensor, table: Tensor, length: int, scale: float) -> Peer:
    """FlashInfer's decode over pages of latents, by the backend that it picks, planned beforehand.

    Args:
        q: [B, Hq, D]. pages: [n_pages, page_size, D]. table: int32 [B, columns]: all pages are full.
        length: keys of each sequence.
    """
    batch, heads, dim = q.shape
    page_size, columns = pages.shape[1], table.shape[1]
    parts = [part.contiguous() for x in (q, pages) for part in (x[..., :LATENT], x[..., LATENT:])]
    ends = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=q.device)
    try:
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.int8, device=q.device)
        wrapper = import_module("flashinfer.mla").BatchMLAPagedAttentionWrapper(workspace)
        wrapper.plan(
            qo_indptr=ends,
            kv_indptr=ends * columns,
            kv_indices=table.flatten(),
            kv_len_arr=lengths,
            num_heads=heads,
            head_dim_ckv=LATENT,
            head_dim_kpe=dim - LATENT,
            page_size=page_size,
            causal=False,
            sm_scale=scale,
            q_data_type=q.dtype,
            kv_data_type=pages.dtype,
        )
        wrapper.run(*parts)
    except Exception as error:  # foreign code: whatever it raises is a reason
        raise Unavailable(f"FlashInfer: {type(error).__name__}: {error}") from error

    def run() -> Tensor:
        out: Tensor = wrapper.run(*parts)
        return out

    return Peer(run, run)


def _modelopt_attention() -> Callable[..., Any]:
    reasons = []
    for name in MODELOPT:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                function = getattr(import_module(name), "attention", None)
        except Exception as error:  # foreign code: whatever it raises is a reason
            reasons.append(str(error))
            continue
        if callable(function):
            found: Callable[..., Any] = function
            return found
        reasons.append(f"{name} offers no attention here")
    raise Unavailable(reasons[0])

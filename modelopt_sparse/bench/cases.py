"""Kinds of cases: each builds its inputs, our call, the peers to set beside it, and the check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from modelopt_sparse.kernels import (
    DENSE,
    AttentionOutput,
    NMSparsity,
    Phase,
    Plan,
    Seqs,
    SkipSoftmax,
    attention_varlen,
)

from . import baselines
from .baselines import PRODUCT, Peer
from .case import CUDNN, FLASH, OWN_DENSE, SDPA, Check, Setting, Trial
from .checks import (
    DENSE_ERROR,
    DIAL_ERROR,
    GRADIENT_ERROR,
    NM_ERROR,
    chunk_error,
    forward_error,
    gradient_error,
    planned_error,
)
from .inputs import SKIPS_NOTHING, THRESHOLD, Inputs, dialled, plain
from .packages import dense_packages, skipping_packages
from .timing import Run

MODELOPT, FLEX = "Model-Optimizer", "FlexAttention"


def forward(inputs: Inputs, plan: Plan = DENSE, details: bool = False) -> AttentionOutput:
    """Our forward of the sequences of `inputs`."""
    q, k, v = inputs.q, inputs.k, inputs.v
    return attention_varlen(q, k, v, inputs.seqs, causal=inputs.causal, plan=plan, details=details)


def timed_forward(inputs: Inputs, plan: Plan = DENSE) -> Run:
    """The same to be timed, without what is made once for a batch: the sequence offsets."""
    return partial(
        attention_varlen, inputs.q, inputs.k, inputs.v, inputs.seqs, causal=inputs.causal, plan=plan
    )


def own_dense(inputs: Inputs) -> Peer:
    """Our own dense kernel."""
    return Peer(timed_forward(inputs), lambda: forward(inputs).out, is_rival=False)


def _sdpa_peers(
    inputs: Inputs, names: Sequence[str], mode: str = "forward"
) -> dict[str, Callable[[], Peer]]:
    """The named backends; off CUDA the one that there is, in place of them."""
    if inputs.q.device.type != "cuda":
        return {SDPA: partial(baselines.sdpa, inputs, None, mode)}
    backends = {CUDNN: SDPBackend.CUDNN_ATTENTION, FLASH: SDPBackend.FLASH_ATTENTION}
    return {name: partial(baselines.sdpa, inputs, backends[name], mode) for name in names}


def dense(
    lengths: Sequence[int], setting: Setting, beside_all: bool = False, causal: bool = True
) -> Trial:
    """Dense forward. If asked to, beside FlexAttention too, which compiles for each length, and packages."""
    inputs = plain(lengths, setting.shape, setting.device, setting.dtype, causal=causal)
    ragged = len(lengths) > 1
    peers = _sdpa_peers(inputs, [CUDNN] if ragged else [CUDNN, FLASH])
    if ragged and setting.device.type == "cuda":
        peers[FLASH] = partial(baselines.flash_varlen, inputs)
    if beside_all and setting.device.type == "cuda":
        peers |= {FLEX: partial(baselines.flex, inputs), **dense_packages(inputs)}
    flops = inputs.flops()
    peers[PRODUCT] = partial(baselines.product_of, flops, setting.device, setting.dtype)
    return Trial(
        partial(forward_error, inputs),
        timed_forward(inputs),
        lambda: Check(forward_error(inputs, forward(inputs).out), DENSE_ERROR),
        peers,
        flops,
    )


def overhead(length: int, setting: Setting) -> Trial:
    """Skipping in force, with a threshold that skips nothing."""
    inputs = plain([length], setting.shape, setting.device, setting.dtype)
    plan = Plan(skip=SkipSoftmax(SKIPS_NOTHING))
    output = forward(inputs, plan)
    wrong = "" if skipped_share(output) == 0 else f"skipped {skipped_share(output):.1%} of tiles"
    return Trial(
        partial(forward_error, inputs),
        timed_forward(inputs, plan),
        lambda: Check(forward_error(inputs, output.out), DENSE_ERROR, wrong),
        {OWN_DENSE: partial(own_dense, inputs), **_sdpa_peers(inputs, [CUDNN])},
        inputs.flops(),
        skipped_share(output),
    )


def skip(length: int, share: float, setting: Setting) -> Trial:
    """Forward with a dialled share of tiles skipped."""
    return _skip(dialled(length, share, setting.shape, setting.device, setting.dtype), setting)


def skip_unevenly(length: int, least: float, most: float, setting: Setting) -> Trial:
    """The same, where every other KV head skips few tiles, and the others many."""
    shares = [least, most] * setting.shape.kv_heads
    shares = shares[: setting.shape.kv_heads]
    return _skip(dialled(length, shares, setting.shape, setting.device, setting.dtype), setting)


def skip_with_hot_rows(length: int, share: float, setting: Setting) -> Trial:
    """The same, but that one row of each row tile needs all keys: nothing can be skipped."""
    inputs = dialled(length, share, setting.shape, setting.device, setting.dtype, has_hot_rows=True)
    return _skip(inputs, setting)


def _skip(inputs: Inputs, setting: Setting) -> Trial:
    (length,) = inputs.lengths
    plan = Plan(skip=SkipSoftmax(THRESHOLD))
    output = forward(inputs, plan, details=True)

    packages = skipping_packages(inputs) if setting.device.type == "cuda" else {}

    def check() -> Check:
        assert output.kept is not None
        error = forward_error(inputs, output.out, output.kept)
        return Check(error, DENSE_ERROR, _miscounted(inputs, output))

    return Trial(
        partial(forward_error, inputs),
        timed_forward(inputs, plan),
        check,
        {**_sdpa_peers(inputs, [CUDNN]), OWN_DENSE: partial(own_dense, inputs), **packages},
        inputs.flops(),
        skipped_share(output),
        length,
    )


def chunk(rows: int, length: int, share: float | None, setting: Setting) -> Trial:
    """The last rows of a sequence whose other keys are there already, dense or with a dialled share skipped.

    Args:
        rows: a multiple of 64. share: of the tiles of the whole sequence; None: dense.
    """
    inputs = (
        plain([length], setting.shape, setting.device, setting.dtype)
        if share is None
        else dialled(length, share, setting.shape, setting.device, setting.dtype)
    )
    seqs = Seqs.from_lengths([rows], [length], setting.device)
    tensors = inputs.q[-rows:].contiguous(), inputs.k, inputs.v
    plan = DENSE if share is None else Plan(skip=SkipSoftmax(THRESHOLD))

    def run(plan: Plan, details: bool = False) -> AttentionOutput:
        return attention_varlen(*tensors, seqs, plan=plan, phase=Phase.PREFILL, details=details)

    def check() -> Check:
        output = run(plan, details=True)
        kept = None if output.kept is None else output.kept[0]
        return Check(chunk_error(inputs, rows, output.out, kept), DENSE_ERROR)

    own = Peer(partial(run, DENSE), lambda: run(DENSE).out, is_rival=False)
    peers: dict[str, Callable[[], Peer]] = {} if share is None else {OWN_DENSE: lambda: own}
    on_cuda = setting.device.type == "cuda"
    backend = SDPBackend.FLASH_ATTENTION if on_cuda else None
    peers[FLASH if on_cuda else SDPA] = partial(baselines.sdpa_chunk, inputs, rows, backend)
    return Trial(
        partial(chunk_error, inputs, rows),
        partial(run, plan),
        check,
        peers,
        inputs.flops() * (1 - (1 - rows / length) ** 2),
        None if share is None else skipped_share(run(plan)),
    )


def tile_list(length: int, share: float, setting: Setting) -> Trial:
    """Forward over a given list of tiles: those that skip-softmax keeps of the same inputs."""
    inputs = dialled(length, share, setting.shape, setting.device, setting.dtype)
    decided = forward(inputs, Plan(skip=SkipSoftmax(THRESHOLD)), details=True)
    plan = Plan(tiles=decided.tiles)

    def check() -> Check:
        out = forward(inputs, plan).out
        error = forward_error(inputs, out, decided.kept)
        return Check(error, DENSE_ERROR, _miscounted(inputs, decided))

    return Trial(
        partial(forward_error, inputs),
        timed_forward(inputs, plan),
        check,
        {**_sdpa_peers(inputs, [CUDNN]), OWN_DENSE: partial(own_dense, inputs)},
        inputs.flops(),
        skipped_share(decided),
    )


def n_of_m(length: int, n: int, m: int, setting: Setting) -> Trial:
    """Forward with N:M sparsity."""
    inputs = plain([length], setting.shape, setting.device, setting.dtype)
    plan = Plan(nm=NMSparsity(n, m))
    peers = {OWN_DENSE: partial(own_dense, inputs)}
    if setting.device.type == "cuda":
        peers[MODELOPT] = partial(baselines.modelopt, inputs, n, m)
    return Trial(
        partial(forward_error, inputs),
        timed_forward(inputs, plan),
        lambda: Check(planned_error(inputs, forward(inputs, plan).out, plan), NM_ERROR),
        peers,
        inputs.flops(),
    )


def backward(length: int, setting: Setting) -> Trial:
    """Dense backward alone, as many KV heads as query heads."""
    shape = replace(setting.shape, kv_heads=setting.shape.q_heads)
    inputs = plain([length], shape, setting.device, setting.dtype)
    leaves, d_out = _leaves(inputs)
    out = attention_varlen(*leaves, inputs.seqs, causal=True).out

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, d_out, retain_graph=True)

    return Trial(
        partial(forward_error, inputs),
        run,
        lambda: Check(gradient_error(inputs, d_out, run()), GRADIENT_ERROR),
        _sdpa_peers(inputs, [CUDNN, FLASH], "backward"),
        2.5 * inputs.flops(),
    )


def training(length: int, share: float, setting: Setting) -> Trial:
    """Forward and backward with a dialled share of tiles skipped."""
    inputs = dialled(length, share, setting.shape, setting.device, setting.dtype)
    plan = Plan(skip=SkipSoftmax(THRESHOLD))
    leaves, d_out = _leaves(inputs)
    decided = forward(inputs, plan, details=True)
    seqs = inputs.seqs

    def step(plan: Plan) -> tuple[Tensor, ...]:
        out = attention_varlen(*leaves, seqs, causal=True, plan=plan).out
        return torch.autograd.grad(out, leaves, d_out)

    def check() -> Check:
        assert decided.kept is not None
        error = gradient_error(inputs, d_out, step(plan), decided.kept[0])
        return Check(error, GRADIENT_ERROR, _miscounted(inputs, decided))

    return Trial(
        partial(forward_error, inputs),
        partial(step, plan),
        check,
        {
            OWN_DENSE: lambda: Peer(
                partial(step, DENSE), lambda: forward(inputs).out, is_rival=False
            ),
            **_sdpa_peers(inputs, [CUDNN], "both"),
        },
        3.5 * inputs.flops(),
        skipped_share(decided),
    )


def _leaves(inputs: Inputs) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """q, k, v that want a gradient, and a gradient of the output."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    generator = torch.Generator(q.device).manual_seed(1)
    d_out = torch.randn(q.shape, generator=generator, device=q.device, dtype=q.dtype)
    return (q, k, v), d_out


def skipped_share(output: AttentionOutput) -> float:
    """The share of visible tiles that prefill skipped."""
    assert output.prefill is not None
    return float(output.prefill.skipped[0].sum() / output.prefill.visible.sum())


def _miscounted(inputs: Inputs, output: AttentionOutput) -> str:
    """What is wrong with the counts: they don't fit the tiles returned, or are far from the dial."""
    assert output.prefill is not None and output.kept is not None and inputs.share is not None
    kept = sum(int(tiles.sum()) for tiles in output.kept if tiles is not None)
    counted = int(output.prefill.visible.sum() - output.prefill.skipped[0].sum())
    if kept != counted:
        return f"{kept} tiles kept, {counted} counted"
    if abs(skipped_share(output) - inputs.share) > DIAL_ERROR:
        return f"skipped {skipped_share(output):.1%}, dialled {inputs.share:.0%}"
    return ""

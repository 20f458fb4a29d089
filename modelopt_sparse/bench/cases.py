"""What is measured: each case builds its inputs, our call, the peers to set beside it, and the check."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from .checks import (
    DENSE_ERROR,
    GRADIENT_ERROR,
    NM_ERROR,
    chunk_error,
    forward_error,
    gradient_error,
    planned_error,
)
from .inputs import THRESHOLD, Inputs, Shape, dialled, plain
from .packages import dense_packages, skipping_packages
from .timing import Run

SKIPS_NOTHING = 1e-30
"""A lambda under which no tile falls."""
DIAL_ERROR = 0.03
"""How far the counted share of skipped tiles may lie from the dial."""
RAGGED = (
    16384, 12288, 8192, 6144, 5120, 4096, 3333, 2777, 2222, 1600, 1111, 850, 600, 400, 250, 169,
)  # fmt: skip
"""16 sequences, 64k tokens."""

OWN_DENSE, CUDNN, FLASH, SDPA = "own dense", "cuDNN", "FlashAttention-2", "SDPA"
MODELOPT, FLEX = "Model-Optimizer", "FlexAttention"


@dataclass(frozen=True)
class Setting:
    """On what the cases run."""

    device: torch.device
    dtype: torch.dtype
    shape: Shape = field(default_factory=Shape)


@dataclass(frozen=True)
class Check:
    """What the check found: the relative error, the bound that it stays under, and anything else wrong."""

    error: float
    bound: float
    wrong: str = ""

    @property
    def passed(self) -> bool:
        """Written so that NaN fails."""
        return self.error <= self.bound and not self.wrong


@dataclass(frozen=True, eq=False)
class Trial:
    """A case, ready to be run.

    Args:
        error: of a dense output, our own or a peer's.
        run: our call, to be timed.
        check: runs it once and compares.
        peers: by name, makers of what is timed in turn with ours.
        flops: of the dense call that does the same.
        sparsity: share of tiles skipped, as the kernel counts; set where something is skipped.
        length: tokens of the one sequence that prefills; None elsewhere, and where heads are of other dims.
    """

    error: Callable[[Tensor], float]
    run: Run
    check: Callable[[], Check]
    peers: Mapping[str, Callable[[], Peer]]
    flops: float
    sparsity: float | None = None
    length: int | None = None


@dataclass(frozen=True)
class Case:
    """A named case of a group, `build` makes it for a setting."""

    group: str
    name: str
    build: Callable[[Setting], Trial] = field(compare=False)


def tokens(n: int) -> str:
    """A length as names of cases spell it."""
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


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


def _with_dim(
    dim: int, build: Callable[[Setting], Trial], setting: Setting, value_dim: int | None = None
) -> Trial:
    shape = replace(setting.shape, head_dim=dim, value_dim=value_dim)
    trial = build(replace(setting, shape=shape))
    return replace(trial, length=None)


def standard_cases() -> list[Case]:
    """The table: bf16, 32 query heads, 8 KV heads, head_dim 128, causal, unless its name says otherwise."""
    k = 1024
    cases = [
        Case("dense", f"dense-{tokens(n)}", partial(dense, [n], beside_all=True))
        for n in (4 * k, 16 * k)
    ]
    cases += [Case("overhead", f"skip0-{tokens(n)}", partial(overhead, n)) for n in (4 * k, 16 * k)]
    cases += [
        Case("skip", f"skip{share}-16k", partial(skip, 16 * k, share / 100))
        for share in (50, 75, 90, 95)
    ]
    cases += [
        Case("skip", "skip10-90-16k", partial(skip_unevenly, 16 * k, 0.1, 0.9)),
        Case("skip", "skip-hot-rows-16k", partial(skip_with_hot_rows, 16 * k, 0.9)),
    ]
    cases += [
        Case("tiles", f"tiles{share}-16k", partial(tile_list, 16 * k, share / 100))
        for share in (50, 90)
    ]
    cases += [
        Case("nm", f"nm{n}:{m}-{tokens(length)}", partial(n_of_m, length, n, m))
        for n, m in ((2, 4), (4, 8))
        for length in (4 * k, 16 * k)
    ]
    cases += [Case("backward", "backward-8k", partial(backward, 8 * k))]
    cases += [
        Case("training", f"training{share}-8k", partial(training, 8 * k, share / 100))
        for share in (50, 75)
    ]
    for n in (2 * k, 8 * k, 32 * k, 64 * k, 128 * k):
        cases.append(Case("others", f"length-{tokens(n)}", partial(dense, [n])))
    for n in (8 * k, 64 * k, 128 * k):
        cases.append(Case("others", f"length-skip75-{tokens(n)}", partial(skip, n, 0.75)))
    for dim in (64, 256):
        for n in (4 * k, 16 * k):
            build = partial(_with_dim, dim, partial(dense, [n]))
            cases.append(Case("others", f"dim{dim}-{tokens(n)}", build))
        build = partial(_with_dim, dim, partial(skip, 16 * k, 0.75))
        cases.append(Case("others", f"dim{dim}-skip75-16k", build))
    build = partial(_with_dim, 192, partial(dense, [16 * k]), value_dim=128)
    cases.append(Case("others", "dims192-128-16k", build))
    cases.append(Case("others", "full-16k", partial(dense, [16 * k], causal=False)))
    cases.append(Case("others", "ragged-64k", partial(dense, RAGGED)))
    cases.append(Case("others", "equal-64k", partial(dense, [4 * k] * 16)))
    for share in (None, 0.75):
        name = "dense" if share is None else f"skip{share:.0%}".rstrip("%")
        build = partial(chunk, 2 * k, 32 * k, share)
        cases.append(Case("chunk", f"chunk-{name}-2k-of-32k", build))
    return cases


def smoke_cases() -> list[Case]:
    """Each kind of case, small."""
    return [
        Case("dense", "dense-200", partial(dense, [200])),
        Case("overhead", "skip0-200", partial(overhead, 200)),
        Case("skip", "skip50-1k", partial(skip, 1024, 0.5)),
        Case("skip", "skip10-60-1k", partial(skip_unevenly, 1024, 0.1, 0.6)),
        Case("skip", "skip-hot-rows-1k", partial(skip_with_hot_rows, 1024, 0.5)),
        Case("tiles", "tiles50-1k", partial(tile_list, 1024, 0.5)),
        Case("nm", "nm2:4-200", partial(n_of_m, 200, 2, 4)),
        Case("backward", "backward-200", partial(backward, 200)),
        Case("training", "training40-900", partial(training, 900, 0.4)),
        Case("others", "dim16-100", partial(_with_dim, 16, partial(dense, [100]))),
        Case(
            "others", "dims48-32-100", partial(_with_dim, 48, partial(dense, [100]), value_dim=32)
        ),
        Case("others", "full-200", partial(dense, [200], causal=False)),
        Case("others", "ragged-300", partial(dense, [150, 129, 20, 1])),
        Case("chunk", "chunk-dense-128-of-1k", partial(chunk, 128, 1024, None)),
        Case("chunk", "chunk-skip50-128-of-1k", partial(chunk, 128, 1024, 0.5)),
    ]

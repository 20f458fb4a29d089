"""Calls on the GPU for tests of one property each: cases with structure, their results by name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from modelopt_sparse.kernels import AttentionOutput, Plan, attention_varlen, prefill
from tests.gpu.build import Setup, build, covered
from tests.gpu.cases import Case
from tests.gpu.gradients import with_leaves
from tests.gpu.tiles import spans

DEVICE = "cuda"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# A case of each kind of plan; together they have every part of one.
KINDS = {
    "dense": Case(0, 0, "mixed", "bf16", (128, 128), (4, 2)),
    "2:4": Case(0, 1, "mixed", "fp16", (64, 64), (4, 2), nm=(2, 4), shield=(4, 17)),
    "4:8": Case(0, 2, "ragged", "bf16", (128, 128), (8, 1), nm=(4, 8)),
    "skip": Case(0, 3, "ragged", "bf16", (128, 128), (4, 2), skip="on"),
    "2:4+skip": Case(
        0, 4, "chunk", "fp16", (64, 64), (4, 2), nm=(2, 4), skip="on", blocks=(16, 16)
    ),
    "exact": Case(0, 5, "chunk", "fp32", (64, 64), (4, 4), skip="exact", blocks=(64, 32)),
    "given": Case(0, 6, "ragged", "fp16", (64, 64), (4, 2), skip="given"),
    "decode": Case(0, 7, "decode", "bf16", (128, 128), (8, 1), skip_decode="on"),
    "decode_per_head": Case(
        0, 8, "with_prefill", "fp16", (64, 64), (4, 2), skip_decode="per_head", segments=(32, 128)
    ),
}
TRAINED = [kind for kind in KINDS if not kind.startswith("decode")]


def kind(name: str, **changes) -> Setup:
    """The call of a kind, with some fields of its case changed."""
    return build(replace(KINDS[name], **changes), DEVICE)


def run(setup: Setup, **changes) -> AttentionOutput:
    """Calls; `changes` replace options, among them the plan."""
    arguments = {**setup.options, "plan": setup.plan, **changes}
    return attention_varlen(*setup.qkv, **arguments)


def without_hopper(monkeypatch) -> None:
    """From now on the kernels compute that run on any GPU: others round otherwise."""
    monkeypatch.setattr(prefill, "prefill_refusals", lambda call: iter(("a test",)))


def run_dense(setup: Setup) -> AttentionOutput:
    return run(setup, plan=Plan())


def results(output: AttentionOutput) -> dict[str, torch.Tensor]:
    """Every tensor that came back, by name."""
    found = {"out": output.out, "lse": output.lse}
    for phase in ("prefill", "decode"):
        counts = getattr(output, phase)
        if counts is not None:
            found |= {f"{phase}.visible": counts.visible, f"{phase}.skipped": counts.skipped}
    for name in ("dropped_mass", "dropped_mass_bound"):
        if getattr(output, name) is not None:
            found[name] = getattr(output, name)
    for name in ("tiles", "decode_tiles"):
        if getattr(output, name) is not None:
            found[name] = getattr(output, name).words
    return {name: value.detach() for name, value in found.items()}


def output_gradient(setup: Setup, seed: int = 0) -> torch.Tensor:
    """A gradient of out, [Tq, Hq, Dv]; 0 in rows that nobody owns."""
    generator = torch.Generator().manual_seed(seed)
    shape = (setup.q.shape[0], setup.q.shape[1], setup.v.shape[-1])
    drawn = torch.randn(shape, generator=generator).to(setup.q.device, setup.q.dtype)
    owned = covered(setup.seqs.q_start, setup.seqs.q_len, shape[0]).to(drawn.device)
    return drawn.masked_fill(~owned[:, None, None], 0.0)


def trained(setup: Setup, d_out: torch.Tensor | None = None, **changes) -> dict[str, torch.Tensor]:
    """The results of a call and the gradients of all that is differentiable, by name."""
    setup, leaves = with_leaves(setup)
    output = run(setup, **changes)
    d_out = output_gradient(setup) if d_out is None else d_out
    gradients = torch.autograd.grad(output.out, list(leaves.values()), d_out)
    return results(output) | {
        f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)
    }


def everything(setup: Setup, name: str) -> dict[str, torch.Tensor]:
    """What a kind of call returns, with details; and its gradients, unless it only decodes."""
    with torch.no_grad():
        found = results(run(setup, details=True))
    if name in TRAINED:
        found |= {f"trained.{key}": value for key, value in trained(setup).items()}
    return found


def assert_same_bits(ours: dict, theirs: dict, what: str = "") -> None:
    """Equal to the bit, NaN and the sign of 0 included."""
    assert ours.keys() == theirs.keys(), what
    for name, value in ours.items():
        other = theirs[name]
        assert value.dtype == other.dtype and value.shape == other.shape, f"{what} {name}"
        if value.is_floating_point():
            kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
            value, other = value.contiguous().view(kind), other.contiguous().view(kind)
        wrong = value != other
        assert not bool(wrong.any()), f"{what} {name}: {int(wrong.sum())} of {wrong.numel()} differ"


def alone(setup: Setup, b: int) -> Setup:
    """Sequence b in tensors of its own."""
    q0, n_q, k0, n_k = spans(setup.seqs)[b]
    rows, keys = slice(q0, q0 + n_q), slice(k0, k0 + n_k)
    seqs = type(setup.seqs).from_lengths([n_q], [n_k], device=setup.q.device)
    q, k, v = setup.q[rows].clone(), setup.k[keys].clone(), setup.v[keys].clone()
    return replace(setup, q=q, k=k, v=v, seqs=seqs)


def unowned_set_to(setup: Setup, value: float) -> Setup:
    """The call with `value` in every element of q, k, v, the bias, and the mask that no sequence owns."""
    seqs = setup.seqs
    rows = covered(seqs.q_start, seqs.q_len, setup.q.shape[0]).to(setup.q.device)
    keys = covered(seqs.k_start, seqs.k_len, setup.k.shape[0]).to(setup.q.device)
    changed = {"q": setup.q.clone(), "k": setup.k.clone(), "v": setup.v.clone()}
    for name, owned in (("q", rows), ("k", keys), ("v", keys)):
        changed[name][~owned] = value
    options = dict(setup.options)
    for name in ("mask", "bias"):
        if name not in options:
            continue
        grid = options[name]
        inside = torch.zeros_like(grid.values, dtype=torch.bool)
        for b, (_, n_q, _, n_k) in enumerate(spans(seqs)):
            r, c = int(grid.row_start[b]), int(grid.key_start[b])
            inside[b, :, r : r + n_q, c : c + n_k] = True
        outside = bool(value) if name == "mask" else value
        options[name] = replace(grid, values=grid.values.masked_fill(~inside, outside))
    if "bounds" in options:
        bound = 2**30 if math.isnan(value) else -7
        options["bounds"] = options["bounds"].masked_fill(~rows[:, None], bound)
    return replace(setup, options=options, **changed)

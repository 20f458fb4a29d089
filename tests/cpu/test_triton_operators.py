"""The Triton kernels as operators of torch, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from modelopt_sparse.errors import UnsupportedCall
from modelopt_sparse.kernels import (
    NMSparsity,
    Plan,
    SkipSoftmax,
    SkipSoftmaxDecode,
    attention_triton,
)
from tests.cpu.test_triton_tiles import random_map
from tests.inputs import features, needs_interpreter, topical
from tests.thinned import thinned

pytestmark = needs_interpreter

NM = NMSparsity(2, 4, 1, 3)
SKIP, DECODE = SkipSoftmax(0.3, 16, 16), SkipSoftmaxDecode(0.3, 16, 64)
PLANS = {
    "dense": Plan(),
    "2:4": Plan(NM),
    "skip": Plan(skip=SKIP, skip_decode=DECODE),
    "given": Plan(),
}


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """Not here: what is traced must be torch's own functions."""


def setup(name: str, names: str = ""):
    inputs = topical(
        [18, 1], [30, 40], heads=2, kv_heads=1, dtype=torch.float16, strength=9.0, gaps=False
    )
    plan = PLANS[name]
    if name == "given":
        plan = Plan(NM, tiles=random_map(inputs, 16, 16))
    return inputs, plan, features(names, inputs)


def operands(name: str, names: str, wants_grad: bool):
    """The arguments of `attention_forward`."""
    from modelopt_sparse.kernels.check import Call, checked
    from modelopt_sparse.kernels.flat import flatten

    inputs, plan, options = setup(name, names)
    if wants_grad:
        inputs.q.requires_grad_(), inputs.k.requires_grad_(), inputs.v.requires_grad_()
    call = checked(Call(*inputs.qkv, plan=plan, **options))
    return (*flatten(call), wants_grad)


# Without "test_aot_dispatch_dynamic": the traced backward pass would be differentiable again, and refuses.
FORWARD_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor")


@thinned(2, name=list(PLANS), names=["", "sinks bias mask", "bounds"])
def test_the_forward_operator_passes_opcheck(name, names):
    operator = torch.ops.modelopt_sparse.attention_forward.default
    torch.library.opcheck(operator, operands(name, names, True), test_utils=FORWARD_TESTS)


@thinned(2, name=list(PLANS), names=["", "sinks bias"])
def test_the_backward_operator_passes_opcheck(name, names):
    arguments = operands(name, names, False)
    found = torch.ops.modelopt_sparse.attention_forward(*arguments[:-1], True)
    out, lse, _, _, words, decode_words, _, _ = found
    arguments = (
        *arguments[:-1], out, lse, words, decode_words, torch.ones_like(out), torch.ones_like(lse),
        "bias" in names,
    )  # fmt: skip
    operator = torch.ops.modelopt_sparse.attention_backward.default
    # It is not differentiable, and says so.
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def step(attention, inputs, plan, options):
    """Output and gradients through a function of tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs.qkv[:3]]
    out, lse = attention(*leaves, inputs.seqs, plan, options)
    return out.detach(), lse.detach(), *torch.autograd.grad(out.square().sum(), leaves)


def scaled(q, k, v, seqs, plan, options):
    output = attention_triton(q * 1.0, k, v, seqs, plan=plan, **options)
    return output.out, output.lse


@thinned(2, name=list(PLANS), names=["", "sinks bias"])
def test_a_compiled_step_is_the_eager_one(name, names):
    inputs, plan, options = setup(name, names)
    torch._dynamo.reset()
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    ours, theirs = (step(f, inputs, plan, options) for f in (compiled, scaled))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_thresholds_that_are_numbers_recompile_a_few_times_at_most():
    inputs, _, _ = setup("skip")
    torch._dynamo.reset()
    # With AOTAutograd, which makes constants of numbers that dynamo has left open.
    counter = CompileCounterWithBackend("aot_eager")

    def forward(q, k, v, threshold):
        plan = Plan(skip=SkipSoftmax(threshold, 16, 16))
        return attention_triton(q, k, v, inputs.seqs, plan=plan).out

    compiled = torch.compile(forward, fullgraph=True, backend=counter)
    seen = []
    with torch.no_grad():
        for threshold in (0.9, 0.8, 0.5, 0.3, 0.1, 1e-30):
            out = compiled(*inputs.qkv[:3], threshold)
            assert torch.equal(out, forward(*inputs.qkv[:3], threshold))
            seen.append(out)
    assert not torch.equal(seen[0], seen[-1])
    assert counter.frame_count <= 3, counter.frame_count


def test_thresholds_in_a_tensor_never_recompile():
    inputs, _, _ = setup("skip")
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    def forward(q, k, v, threshold):
        plan = Plan(skip=SkipSoftmax(threshold, 16, 16))
        return attention_triton(q, k, v, inputs.seqs, plan=plan).out

    compiled = torch.compile(forward, fullgraph=True, backend=backend)
    with torch.no_grad():
        for threshold in (0.9, 0.5, 0.1):
            value = torch.tensor(threshold)
            out = compiled(*inputs.qkv[:3], value)
            assert torch.equal(out, forward(*inputs.qkv[:3], value))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["dense", "skip"])
def test_a_second_derivative_is_refused(name):
    inputs, plan, _ = setup(name)
    q, k, v = (x.requires_grad_() for x in inputs.qkv[:3])
    out = attention_triton(q, k, v, inputs.seqs, plan=plan).out
    (d_q,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(UnsupportedCall, match="attention_reference"):
        torch.autograd.grad(d_q.float().square().sum(), k)


@pytest.mark.parametrize("name", PLANS)
def test_the_operator_computes_what_a_call_without_gradients_does(name):
    inputs, plan, _ = setup(name)
    leaves = [x.detach().clone().requires_grad_() for x in inputs.qkv[:3]]
    with torch.no_grad():
        plain = attention_triton(*leaves, inputs.seqs, plan=plan)
    tracked = attention_triton(*leaves, inputs.seqs, plan=plan)
    assert plain.out.grad_fn is None and tracked.out.grad_fn is not None
    assert torch.equal(plain.out, tracked.out) and torch.equal(plain.lse, tracked.lse)
    for phase in ("prefill", "decode"):
        one, other = getattr(plain, phase), getattr(tracked, phase)
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one.skipped, other.skipped)
            assert torch.equal(one.visible, other.visible)
    if plain.dropped_mass_bound is not None:
        assert torch.equal(plain.dropped_mass_bound, tracked.dropped_mass_bound)
        assert not tracked.dropped_mass_bound.requires_grad

"""The kernels as operators of torch: torch.compile, opcheck, second derivatives."""

from __future__ import annotations

import pytest
import torch

from modelopt_sparse.errors import UnsupportedCall
from modelopt_sparse.kernels import Plan, ops
from modelopt_sparse.kernels.check import Call, checked
from modelopt_sparse.kernels.flat import flatten
from tests.gpu import calls
from tests.gpu.calls import DEVICE, assert_same_bits, kind, needs_cuda, output_gradient, run
from tests.gpu.gradients import with_leaves

pytestmark = needs_cuda


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """Not here: what is traced must be torch's own functions."""


def step(setup, attention):
    """Forward and backward through a function of tensors."""
    setup, leaves = with_leaves(setup)
    out, lse = attention(*setup.qkv, setup.options, setup.plan)
    gradients = torch.autograd.grad(out, list(leaves.values()), output_gradient(setup))
    named = {f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "lse": lse.detach()} | named


def scaled_attention(q, k, v, seqs, options, plan):
    output = calls.attention_varlen(q * 1.0, k, v, seqs, plan=plan, **options)
    return output.out, output.lse


@pytest.mark.parametrize("options", ["", "sinks bias", "bounds"])
@pytest.mark.parametrize("name", ["dense", "2:4", "skip", "given"])
def test_a_compiled_training_step_is_the_eager_one(name, options):
    changes = {"sight": options} if options == "bounds" else dict.fromkeys(options.split(), True)
    setup = kind(name, **changes)
    torch._dynamo.reset()
    compiled = torch.compile(scaled_attention, fullgraph=True)
    assert_same_bits(step(setup, compiled), step(setup, scaled_attention))


@pytest.mark.parametrize("name", ["dense", "2:4", "skip", "decode", "decode_per_head"])
def test_a_compiled_forward_is_the_eager_one(name):
    setup = kind(name, threshold="both")

    def forward(q, k, v, seqs, options, plan):
        output = calls.attention_varlen(q * 1.0, k, v, seqs, plan=plan, **options)
        counts = [c for c in (output.prefill, output.decode) if c is not None]
        return (output.out, output.lse, *(c.skipped for c in counts), *(c.visible for c in counts))

    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True)
    with torch.no_grad():
        ours = compiled(*setup.qkv, setup.options, setup.plan)
        theirs = forward(*setup.qkv, setup.options, setup.plan)
    names = [str(i) for i in range(len(theirs))]
    assert_same_bits(dict(zip(names, ours, strict=True)), dict(zip(names, theirs, strict=True)))


def test_a_compiled_call_takes_other_lengths_without_a_graph_break():
    torch._dynamo.reset()
    compiled = torch.compile(scaled_attention, fullgraph=True, dynamic=True)
    for shape in ("single", "ragged", "chunk"):
        setup = kind("skip", shape=shape)
        arguments = (*setup.qkv, setup.options, setup.plan)
        with torch.no_grad():
            ours, theirs = compiled(*arguments), scaled_attention(*arguments)
        assert_same_bits({"out": ours[0]}, {"out": theirs[0]})


def spread(name: str) -> tuple:
    """The arguments of the operators for the call of a kind, all but the last."""
    setup, _ = with_leaves(kind(name))
    return flatten(checked(Call(*setup.qkv, plan=setup.plan, **setup.options)))


@pytest.mark.parametrize("name", ["dense", "2:4", "skip", "given", "decode"])
def test_the_forward_operator_passes_opcheck(name):
    torch.library.opcheck(
        torch.ops.modelopt_sparse.attention_forward.default, (*spread(name), True)
    )


@pytest.mark.parametrize("name", ["dense", "skip"])
def test_the_backward_operator_passes_opcheck(name):
    arguments = spread(name)
    with torch.no_grad():
        out, lse, _, _, words, decode_words, _, _ = ops.attention_forward(*arguments, True)
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    results = (out, lse, words, decode_words, torch.randn_like(out), torch.randn_like(lse), False)
    operator = torch.ops.modelopt_sparse.attention_backward.default
    torch.library.opcheck(operator, (*arguments, *results))


@pytest.mark.parametrize("name", ["dense", "skip"])
def test_a_second_derivative_is_refused(name):
    setup, leaves = with_leaves(kind(name))
    output = run(setup)
    (dq,) = torch.autograd.grad(
        output.out, [leaves["q"]], output_gradient(setup), create_graph=True
    )
    with pytest.raises(UnsupportedCall):
        torch.autograd.grad(dq.float().square().sum(), [leaves["k"]])


def test_no_gradient_is_kept_where_none_is_wanted():
    setup = kind("dense")
    assert run(setup).out.grad_fn is None
    setup, leaves = with_leaves(setup)
    with torch.no_grad():
        assert run(setup).out.grad_fn is None
    some = [leaves["v"]]
    setup.q.requires_grad_(False)
    setup.k.requires_grad_(False)
    output = run(setup, plan=Plan())
    (dv,) = torch.autograd.grad(output.out, some, output_gradient(setup))
    assert dv.shape == leaves["v"].shape and dv.device.type == torch.device(DEVICE).type


def test_autocast_leaves_the_call_alone():
    setup = kind("dense", dtype="fp32", dims=(64, 64))
    plain = run(setup)
    with torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16):
        inside = run(setup)
    assert_same_bits({"out": inside.out}, {"out": plain.out})


def test_products_of_fp32_are_ieee_unless_tf32_was_chosen():
    setup = kind("dense", dtype="fp32", dims=(64, 64), inputs="normal")
    exact = run(setup).out
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        rounded = run(setup).out
    finally:
        torch.set_float32_matmul_precision(before)
    if rounded.is_cuda:
        assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=2e-2)

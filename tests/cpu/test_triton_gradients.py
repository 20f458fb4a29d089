"""Gradients of the Triton kernels in Triton's interpreter, against autograd of the reference in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from modelopt_sparse.kernels import (
    NMSparsity,
    Phase,
    Plan,
    ScoreGrid,
    SkipSoftmax,
    SkipSoftmaxDecode,
    attention_reference,
    attention_triton,
    backward,
    forward,
)
from modelopt_sparse.kernels.check import Call
from tests.cpu.test_triton_tiles import random_map
from tests.inputs import EXACT_SCALE, features, integers, needs_interpreter, topical
from tests.thinned import thinned

pytestmark = needs_interpreter

NM = NMSparsity(2, 4, 1, 3)
SKIP = SkipSoftmax(0.3, 16, 16)
DECODE = SkipSoftmaxDecode(0.3, 16, 64)
PLANS = {
    "dense": Plan(),
    "2:4": Plan(NM),
    "3:8": Plan(NMSparsity(3, 8, 0, 0)),
    "skip": Plan(skip=SKIP, skip_decode=DECODE),
    "2:4+skip": Plan(NM, SKIP, replace(DECODE, vote_heads=1)),
    "exact": Plan(
        skip=replace(SKIP, exact_normalizer=True),
        skip_decode=replace(DECODE, exact_normalizer=True),
    ),
}
NAMES = ["", "full", "softcap sinks", "window", "bias", "head_bias sinks", "bounds", "tile_mask"]
# Of the largest gradient: rounding of inputs to products, and of out, from which delta is had.
SHARE = {torch.float32: 5e-5, torch.float16: 8e-3}


def small(make=topical, q_lens=(18, 1, 9, 0), k_lens=(50, 90, 5, 3), **more):
    more = {"heads": 2, "kv_heads": 1, "dtype": torch.float16} | more
    more |= {} if make is integers else {"strength": 9.0, "topics": 2}
    return make(list(q_lens), list(k_lens), **more)


def gradients(entry, inputs, plan, options, dtype, lse=True):
    """The call, and its gradients by name, of a loss over out and lse."""
    options = dict(options)
    leaves = {
        name: x.to(dtype, copy=True).requires_grad_()
        for name, x in zip("qkv", inputs.qkv, strict=False)
    }
    if "sinks" in options:
        leaves["sinks"] = options["sinks"].to(dtype, copy=True).requires_grad_()
        options["sinks"] = leaves["sinks"]
    if "bias" in options:
        leaves["bias"] = options["bias"].values.to(dtype, copy=True).requires_grad_()
        options["bias"] = replace(options["bias"], values=leaves["bias"])
    q, k, v = (leaves[name] for name in "qkv")
    result = entry(q, k, v, inputs.seqs, plan=plan, details=True, **options)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(result.out.shape, generator=generator).half()
    loss = (result.out * weight.to(dtype)).sum()
    if lse:
        seen = result.lse.isfinite()
        of_rows = torch.randn(result.lse.shape, generator=generator).half()
        loss = loss + (result.lse[seen] * of_rows[seen].to(result.lse.dtype)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return result, dict(zip(leaves, found, strict=True))


def check_gradients(inputs, plan, lse=True, **options):
    dtype = inputs.q.dtype
    ours, found = gradients(attention_triton, inputs, plan, options, dtype, lse)
    theirs, wanted = gradients(attention_reference, inputs, plan, options, torch.float64, lse)
    if theirs.kept is not None:
        for one, other in zip(ours.kept, theirs.kept, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
    largest = max(float(truth.abs().max()) for truth in wanted.values())
    for name, truth in wanted.items():
        # The terms of one gradient may cancel; what is left is their rounding.
        limit = SHARE[dtype] * float(truth.abs().max()) + 2 * torch.finfo(dtype).eps * largest
        got = found[name].double()
        assert found[name].dtype == dtype and got.isfinite().all(), f"d{name}"
        assert (got[truth == 0].abs() <= limit).all(), f"d{name}: where it is 0"
        off = float((got - truth).abs().max()) if truth.numel() else 0.0
        assert off <= limit, f"d{name}: off by {off:.2e}, largest {float(truth.abs().max()):.2e}"
    return theirs, found


@thinned(8, plan=PLANS, names=NAMES)
def test_gradients_are_those_of_the_reference(plan, names):
    inputs = small()
    result, _ = check_gradients(inputs, plan, **features(names, inputs))
    if plan.skip is not None and names not in ("window", "bounds", "tile_mask"):
        assert result.prefill.skipped[0].sum() > 0 and result.decode.skipped[0].sum() > 0


@thinned(2, plan=["2:4", "dense", "exact", "skip"])
def test_gradients_are_those_of_the_reference_in_fp32(plan):
    check_gradients(small(dtype=torch.float32), PLANS[plan])


@thinned(
    2,
    layout={"3": (3, 3), "4kv2": (4, 2)},
    plan={"64x128": Plan(skip=SkipSoftmax(0.9)), "": PLANS["dense"]},
)
def test_gradients_are_those_of_the_reference_in_other_layouts(layout, plan):
    heads, kv_heads = layout
    inputs = small(
        q_lens=[70, 1], k_lens=[300, 60], heads=heads, kv_heads=kv_heads, dim=24, dim_v=40, span=128
    )
    result, _ = check_gradients(inputs, plan)
    assert plan.skip is None or result.prefill.skipped[0].sum() > 0


@thinned(
    4,
    names=["", "bounds"],
    tile=[(16, 16), (64, 128), (128, 32)],
    nm={"": None, "2:4": NM},
)
def test_given_tiles_have_the_gradients_of_the_reference(names, tile, nm):
    inputs = small()
    plan = Plan(nm, tiles=random_map(inputs, *tile))
    check_gradients(inputs, plan, **features(names, inputs))


@thinned(2, scale=[-0.4, 0.0], plan=["dense", "2:4", "skip"])
def test_scales_that_are_not_positive_have_gradients(scale, plan):
    inputs = small(q_lens=[18, 1], k_lens=[40, 30])
    _, found = check_gradients(inputs, PLANS[plan], scale=scale)
    if not scale:
        assert not found["q"].any() and not found["k"].any() and found["v"].any()


@pytest.mark.parametrize("phase", Phase)
def test_a_given_phase_is_that_of_the_backward_pass_too(phase):
    inputs = small(q_lens=[4, 1], k_lens=[90, 77], span=32)
    check_gradients(inputs, Plan(NM, SKIP, DECODE), phase=phase)


@pytest.mark.parametrize("lse", [False, True], ids=["out", "lse"])
def test_either_output_alone_has_a_gradient(lse):
    inputs = small(q_lens=[18], k_lens=[40])
    if not lse:
        check_gradients(inputs, Plan(), lse=False)
        return
    leaves = [
        [x.to(t).requires_grad_() for x in inputs.qkv[:3]] for t in (torch.half, torch.double)
    ]
    found = [
        torch.autograd.grad(entry(*x, inputs.seqs).lse[2:].sum(), x[:2])
        for entry, x in zip((attention_triton, attention_reference), leaves, strict=True)
    ]
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-2, atol=1e-2)


def levels(tiles, n_q=3):
    """One head whose rows all see key tiles of 16 at these log2 scores."""
    inputs = small(integers, [n_q], [16 * len(tiles)], heads=1, dtype=torch.float32, gaps=False)
    inputs.q[:] = torch.tensor([1.0, 0, 0, 0])
    inputs.k[:] = 0
    inputs.k[:, 0, 0] = torch.tensor(tiles).repeat_interleave(16)
    return inputs


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
def test_keys_of_skipped_tiles_get_no_gradient(exact, phase):
    inputs = levels([-9.0, -12.0, -20.0, -8.0])
    q, k, v = (x.clone().requires_grad_() for x in inputs.qkv[:3])
    plan = Plan(
        skip=SkipSoftmax(0.5, 16, 16, exact_normalizer=exact),
        skip_decode=SkipSoftmaxDecode(0.5, 16, 64, exact_normalizer=exact),
    )
    options = {"scale": EXACT_SCALE, "plan": plan, "details": True, "phase": phase}
    result = attention_triton(q, k, v, inputs.seqs, **options)
    skipped = ~result.kept[0][0, 0].repeat_interleave(16)
    assert skipped.any()
    result.out.square().sum().backward()
    assert (v.grad[skipped] == 0).all() and (v.grad[~skipped] != 0).any()
    assert exact != bool((k.grad[skipped] == 0).all()) and (k.grad[~skipped] != 0).any()


def test_a_kept_tile_keeps_its_gradient_though_a_later_one_dwarfs_it():
    # visited last, first, then from the end: tile 2 is kept before tile 1 is seen
    inputs = levels([0.0, 8.0, 0.0, 0.0])
    plan = Plan(skip=SkipSoftmax(0.5, 16, 16))
    result, found = check_gradients(inputs, plan, scale=EXACT_SCALE, lse=False)
    assert result.kept[0].all()
    assert (found["v"][32:48] != 0).all()


@thinned(2, n_q=[20, 1], plan=["dense", "2:4", "skip"], poison=[math.nan, math.inf])
def test_what_hidden_keys_hold_never_leaks_into_gradients(n_q, plan, poison):
    inputs = small(q_lens=[n_q], k_lens=[60], gaps=False)
    hidden = torch.arange(60) % 7 == 0
    options = {"mask": ScoreGrid((~hidden).expand(1, 1, n_q, 60))}

    def found():
        return gradients(attention_triton, inputs, PLANS[plan], options, torch.float16)[1]

    clean = found()
    inputs.k[hidden], inputs.v[hidden] = poison, poison
    for name, got in found().items():
        assert torch.equal(got, clean[name]) and got.isfinite().all(), name


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_rows_that_see_no_key_have_and_give_no_gradient(sinks):
    inputs = small(q_lens=[20], k_lens=[17], gaps=False)
    options = features("sinks", inputs) if sinks else {}
    _, found = check_gradients(inputs, Plan(), **options)
    assert not found["q"][:3].any()


def test_gradients_are_the_same_to_the_bit_each_time():
    inputs = small()
    calls = [
        gradients(attention_triton, inputs, PLANS["2:4+skip"], {}, torch.float16)[1]
        for _ in range(2)
    ]
    assert all(torch.equal(calls[0][name], calls[1][name]) for name in calls[0])


@pytest.mark.parametrize("plan", ["dense", "2:4+skip"])
def test_nothing_is_launched_for_sequences_of_one_row_where_there_are_none(plan, monkeypatch):
    inputs = small(q_lens=(18, 0, 9), k_lens=(50, 3, 30))
    wanted = gradients(attention_triton, inputs, PLANS[plan], {}, torch.float16)

    def refuse(*arguments):
        raise AssertionError("launched for sequences of one row")

    monkeypatch.setattr(forward, "launch_decode", refuse)
    with pytest.raises(AssertionError, match="one row"):
        attention_triton(*inputs.qkv)
    known = replace(inputs, seqs=replace(inputs.seqs, min_q=9))
    found = gradients(attention_triton, known, PLANS[plan], {}, torch.float16)
    assert torch.equal(found[0].out, wanted[0].out)
    assert all(torch.equal(found[1][name], x) for name, x in wanted[1].items())
    call = Call(*known.qkv, plan=PLANS[plan])
    assert len(backward._parts(call, None, None)) == 1


def test_only_what_wants_a_gradient_gets_one():
    inputs = small(q_lens=[18], k_lens=[40])
    q, k, v = inputs.qkv[:3]
    _, all_of_them = gradients(attention_triton, inputs, Plan(), {}, torch.float16, lse=False)
    v = v.clone().requires_grad_()
    result = attention_triton(q, k, v, inputs.seqs)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(result.out.shape, generator=generator).half()
    (result.out * weight).sum().backward()
    assert torch.equal(v.grad, all_of_them["v"])

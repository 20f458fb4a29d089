"""A scale factor: each sequence has a lambda of its own, by its own number of keys."""

from __future__ import annotations

import math

import pytest
import torch

from modelopt_sparse.errors import ArgumentError, ArgumentTypeError
from modelopt_sparse.kernels import (
    Plan,
    ScaleFactors,
    SkipSoftmax,
    SkipSoftmaxDecode,
    attention_paged,
    attention_reference,
    attention_triton,
)
from modelopt_sparse.kernels.check import Call, checked
from tests.inputs import needs_interpreter, topical
from tests.paged import in_pages

SMALL = {"dim": 16, "strength": 1.5, "span": 16, "dtype": torch.float32}
LENGTHS = [150, 400]
ROWS = {"prefill": LENGTHS, "decode": [1, 1]}


def plan_of(**skip) -> Plan:
    threshold = skip.pop("threshold", None)
    return Plan(
        skip=SkipSoftmax(threshold, 16, 16, **skip),
        skip_decode=SkipSoftmaxDecode(threshold, 16, 64, **skip),
    )


def inputs_of(phase: str):
    return topical(ROWS[phase], LENGTHS, **SMALL)


@pytest.mark.parametrize("phase", ROWS)
def test_lambda_is_the_factor_over_the_own_length(phase):
    inputs, attend = inputs_of(phase), attention_reference
    found = attend(*inputs.qkv, plan=plan_of(scale_factor=60.0), details=True)
    lambdas = torch.tensor([[60.0 / n] for n in LENGTHS])
    wanted = attend(*inputs.qkv, plan=plan_of(threshold=lambdas), details=True)
    assert torch.equal(found.out, wanted.out)
    assert all(map(torch.equal, found.kept, wanted.kept))
    of_longest = attend(*inputs.qkv, plan=plan_of(threshold=60.0 / 400), details=True)
    assert torch.equal(found.kept[1], of_longest.kept[1])
    assert not torch.equal(found.kept[0], of_longest.kept[0])


@pytest.mark.parametrize("phase", ROWS)
def test_no_lambda_is_above_1_and_a_factor_of_0_is_dense(phase):
    inputs = inputs_of(phase)
    greatest = attention_reference(*inputs.qkv, plan=plan_of(scale_factor=1e9), details=True)
    one = attention_reference(*inputs.qkv, plan=plan_of(threshold=1.0), details=True)
    assert all(map(torch.equal, greatest.kept, one.kept))
    dense = attention_reference(*inputs.qkv, plan=plan_of(scale_factor=0))
    assert dense.prefill is dense.decode is None
    assert torch.equal(dense.out, attention_reference(*inputs.qkv).out)


@pytest.mark.parametrize("phase", ROWS)
def test_it_is_rounded_once_whatever_torch_takes_for_a_number(phase):
    """Of factor / n = 1 the reciprocal of n, times the factor, may be less."""
    inputs = topical([41 if phase == "prefill" else 1], [41], dim=16, dtype=torch.float32)
    call = Call(*inputs.qkv, plan_of(scale_factor=41.0))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        plan = checked(call).plan
    finally:
        torch.set_default_dtype(before)
    for part in (plan.skip, plan.skip_decode):
        assert part.threshold.dtype == torch.float64 and part.threshold.tolist() == [[1.0]]


def test_further_lambdas_and_the_histogram_are_counted_beside_it():
    inputs, attend = inputs_of("prefill"), attention_reference
    found = attend(
        *inputs.qkv, plan=plan_of(scale_factor=60.0, count_thresholds=(0.5,), histogram=True)
    )
    alone = attend(*inputs.qkv, plan=plan_of(threshold=0.5))
    plain = attend(*inputs.qkv, plan=plan_of(scale_factor=60.0))
    assert torch.equal(found.prefill.skipped[1], alone.prefill.skipped[0])
    assert torch.equal(found.prefill.skipped[0], plain.prefill.skipped[0])
    assert torch.equal(found.prefill.histogram[9:].sum(0), alone.prefill.skipped[0])


def test_keys_in_pages_count_as_keys():
    inputs, how = inputs_of("decode"), {"plan": plan_of(scale_factor=60.0), "details": True}
    wanted = attention_reference(*inputs.qkv, **how)
    found = attention_paged(inputs.q, in_pages(*inputs.qkv[1:], 7), inputs.seqs, **how)
    assert all(map(torch.equal, found.kept, wanted.kept))


@needs_interpreter
def test_the_kernels_take_it():
    inputs = topical([40, 1], [60, 130], **SMALL)
    ours, wanted = (
        attend(*inputs.qkv, plan=plan_of(scale_factor=60.0), details=True)
        for attend in (attention_triton, attention_reference)
    )
    assert all(map(torch.equal, ours.kept, wanted.kept))
    for phase in ROWS:
        assert 0 < getattr(wanted, phase).skipped.sum() < getattr(wanted, phase).visible.sum()


def test_short_sequences_may_be_dense():
    inputs = inputs_of("prefill")
    found = attention_reference(
        *inputs.qkv, plan=plan_of(scale_factor=60.0, min_context=200), details=True
    )
    wanted = attention_reference(*inputs.qkv, plan=plan_of(scale_factor=60.0), details=True)
    assert torch.equal(found.kept[1], wanted.kept[1])
    assert int(found.kept[0].sum()) == int((wanted.kept[0] | found.kept[0]).sum())
    assert int(found.kept[0].sum()) > int(wanted.kept[0].sum())


REFUSED = {
    "negative": (-1.0, ArgumentError),
    "nan": (math.nan, ArgumentError),
    "infinite": (math.inf, ArgumentError),
    "a bool": (True, ArgumentTypeError),
    "text": ("40", ArgumentTypeError),
}


@pytest.mark.parametrize(("factor", "error"), REFUSED.values(), ids=REFUSED)
def test_other_factors_are_refused(factor, error):
    with pytest.raises(error, match="scale_factor: got"):
        attention_reference(*inputs_of("prefill").qkv, plan=plan_of(scale_factor=factor))


def test_a_threshold_beside_it_is_refused():
    with pytest.raises(ArgumentError, match="one of threshold and scale_factor"):
        attention_reference(
            *inputs_of("prefill").qkv, plan=plan_of(scale_factor=2.0, threshold=0.1)
        )


def test_between_lengths_the_factor_follows_a_line_of_logarithms_and_beyond_it_stays():
    scale = ScaleFactors((100, 400), (2.0, 32.0))
    n = torch.tensor([1, 50, 100, 200, 400, 1000], dtype=torch.int32)
    # 200 is half-way from 100 to 400, and 8 from 2 to 32.
    wanted = [1.0, 2 / 50, 2 / 100, 8 / 200, 32 / 400, 32 / 1000]
    found = scale.thresholds(n)
    assert found.dtype == torch.float64 and found.shape == (6, 1)
    assert found[:, 0].tolist() == pytest.approx(wanted, rel=1e-12)
    one = ScaleFactors((7,), (30.0,)).thresholds(n)
    assert one[:, 0].tolist() == pytest.approx([min(30.0 / int(x), 1.0) for x in n], rel=1e-12)


@pytest.mark.parametrize("phase", ROWS)
def test_each_head_has_factors_of_its_own(phase):
    inputs, attend = inputs_of(phase), attention_reference
    heads = inputs.q.shape[1]
    factors = tuple(20.0 * (1 + head) for head in range(heads))
    scale = ScaleFactors((150, 400), (factors, tuple(2 * x for x in factors)))
    found = attend(*inputs.qkv, plan=plan_of(scale_factor=scale), details=True)
    lambdas = torch.tensor([[x * (1 + b) / n for x in factors] for b, n in enumerate(LENGTHS)])
    wanted = attend(*inputs.qkv, plan=plan_of(threshold=lambdas.clamp(max=1)), details=True)
    assert all(map(torch.equal, found.kept, wanted.kept))
    skipped = getattr(found, phase).skipped[0]
    assert skipped.unique().numel() > 1
    with pytest.raises(ArgumentError, match=f"got factors for {heads + 1} heads"):
        other = ScaleFactors((1,), ((1.0,) * (heads + 1),))
        attend(*inputs.qkv, plan=plan_of(scale_factor=other))


@pytest.mark.parametrize(
    ("lengths", "factors"),
    [
        ((), ()),
        ((4, 4), (1.0, 1.0)),
        ((8, 4), (1.0, 1.0)),
        ((0,), (1.0,)),
        ((4,), (1.0, 2.0)),
        ((4,), (0.0,)),
        ((4,), (math.nan,)),
        ((4, 8), ((1.0, 2.0), (1.0,))),
        ((4,), ((),)),
    ],
)
def test_factors_that_are_no_table_are_refused(lengths, factors):
    with pytest.raises(ArgumentError, match=r"lengths|factors"):
        ScaleFactors(lengths, factors)

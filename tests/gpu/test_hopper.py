"""Hopper's prefill kernel beside the one that runs on any GPU: which calls it gets, and that both agree."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modelopt_sparse.kernels import Phase, attention_paged, attention_varlen, explain
from tests.gpu.build import build
from tests.gpu.calls import DEVICE, assert_same_bits, needs_cuda, results, run, without_hopper
from tests.gpu.cases import HOPPER_RULES, HOPPER_VARIANT, PREFILL_RUN, Case, hopper_cases
from tests.gpu.checks import check
from tests.gpu.gradients import check_gradients
from tests.paged import in_pages
from tests.pairwise import uncovered

pytestmark = [
    needs_cuda,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
        reason="needs compute capability 9.0",
    ),
]
CASES = hopper_cases() if torch.cuda.is_available() else []
MEASURED = ("out", "lse", "dropped_mass", "dropped_mass_bound")
DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
SIGHTS = {
    "causal": {},
    "all keys": {"sight": "full"},
    "window": {"sight": "window"},
    "sinks": {"sinks": True},
}
PLANS = {
    "dense": {},
    "skip": {"skip": "on"},
    "exact": {"skip": "exact"},
    "given": {"skip": "given"},
}


def setup_of(plan: str, sight: str = "causal", dims=(128, 128), shape="ragged", **changes):
    case = Case(0, 11, shape, "bf16", dims, (4, 2), **PLANS[plan], **SIGHTS[sight])
    return build(replace(case, **changes), DEVICE)


def call_of(setup, page: int, layout: str):
    """What computes a setup, over pages or none, and its arguments before the options."""
    if not page:
        return attention_varlen, setup.qkv
    cache = in_pages(*setup.qkv[1:], page, layout)
    return attention_paged, (setup.q, cache, setup.seqs)


def assert_is_hoppers(setup, page: int = 0, layout: str = "nhd") -> None:
    attend, arguments = call_of(setup, page, layout)
    choices = explain(attend, *arguments, **setup.options, plan=setup.plan)
    kernels = {choice.kernel for choice in choices if choice.phase is Phase.PREFILL}
    assert kernels == {"hopper prefill"}, choices


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("plan", PLANS)
def test_both_kernels_decide_alike(plan, sight, dims, monkeypatch):
    setup = setup_of(plan, sight, dims)
    assert_is_hoppers(setup)
    with torch.no_grad():
        found = results(run(setup, details=True))
        without_hopper(monkeypatch)
        wanted = results(run(setup, details=True))
    decided = [name for name in wanted if name not in MEASURED]
    assert_same_bits({x: found[x] for x in decided}, {x: wanted[x] for x in decided})
    for name in (x for x in MEASURED if x in wanted):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-2, atol=4e-3)
    if plan in ("skip", "exact") and sight != "window":  # there is little to skip in a narrow one
        assert 0 < int(found["prefill.skipped"].sum()) < int(found["prefill.visible"].sum())


@pytest.mark.parametrize(
    "case",
    [pytest.param(x, id=x.name, marks=pytest.mark.xdist_group(f"variant{x.group}")) for x in CASES],
)
def test_a_call_is_as_near_to_the_reference_as_plain_attention(case):
    setup = build(case, DEVICE)
    assert_is_hoppers(setup, case.page, case.layout)

    def attend(q, k, v, seqs, **options):
        kernel, arguments = call_of(replace(setup, q=q, k=k, v=v), case.page, case.layout)
        return kernel(*arguments, **options)

    _, sheets = check(setup, attend)
    if case.gradients:
        check_gradients(setup, attention_varlen, sheets, case.seed)


def test_every_two_levels_meet_in_200_cases():
    factors = HOPPER_VARIANT | PREFILL_RUN
    rows = [{name: getattr(case, name) for name in factors} for case in CASES]
    assert not uncovered(rows, factors, HOPPER_RULES)
    assert len({case.name for case in CASES}) == len(CASES) >= 200


@pytest.mark.parametrize("page", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("plan", ["dense", "skip"])
def test_pages_change_no_bit(plan, page):
    setup = setup_of(plan)
    assert_is_hoppers(setup, page)
    attend, arguments = call_of(setup, page, "nhd")
    with torch.no_grad():
        found = results(attend(*arguments, **setup.options, plan=setup.plan, details=True))
        assert_same_bits(found, results(run(setup, details=True)))


def test_a_hundred_runs_of_many_programs_are_equal():
    """More programs than run at a time, so that each is followed by others on its multiprocessor."""
    setup = setup_of("skip", shape="single")
    many = replace(
        setup, q=setup.q.repeat(1, 64, 1), k=setup.k.repeat(1, 64, 1), v=setup.v.repeat(1, 64, 1)
    )
    with torch.no_grad():
        first = results(run(many))
        for repeat in range(1, 100):
            assert_same_bits(results(run(many)), first, f"repeat {repeat}:")

"""Calls in which every two levels of any two factors meet, against the reference in float64.

Best run with `pytest --dist loadgroup`: the cases of a group share their kernels.
"""

from __future__ import annotations

import pytest
import torch

from modelopt_sparse.kernels import attention_reference, attention_varlen
from tests.gpu.build import build
from tests.gpu.cases import (
    DECODE_RUN,
    DECODE_VARIANT,
    PREFILL_RULES,
    PREFILL_RUN,
    PREFILL_VARIANT,
    decode_cases,
    prefill_cases,
)
from tests.gpu.checks import check
from tests.gpu.gradients import check_gradients
from tests.pairwise import uncovered

DEVICE = "cuda"
HAS_DEVICE = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not HAS_DEVICE, reason="needs a CUDA device")
# Without a GPU they are not even made.
PREFILL, DECODE = (prefill_cases(), decode_cases()) if HAS_DEVICE else ([], [])


def params(cases):
    return [
        pytest.param(case, id=case.name, marks=pytest.mark.xdist_group(f"variant{case.group}"))
        for case in cases
    ]


@pytest.mark.parametrize("case", params(PREFILL + DECODE))
def test_a_call_is_as_near_to_the_reference_as_plain_attention(case):
    setup = build(case, DEVICE)
    _, sheets = check(setup, attention_varlen)
    if case.gradients:
        check_gradients(setup, attention_varlen, sheets, case.seed)


def test_every_two_levels_meet_in_at_least_600_cases():
    for cases, factors, rules in (
        (PREFILL, PREFILL_VARIANT | PREFILL_RUN, PREFILL_RULES),
        (DECODE, DECODE_VARIANT | DECODE_RUN, ()),
    ):
        rows = [{name: getattr(case, name) for name in factors} for case in cases]
        assert not uncovered(rows, factors, rules)
    names = {case.name for case in PREFILL + DECODE}
    assert len(names) == len(PREFILL + DECODE) >= 600


@pytest.mark.parametrize(("phase", "share"), [("prefill", 0.75), ("decode", 0.6)])
def test_most_calls_with_tiles_to_skip_skip_some_and_keep_some(phase, share):
    # The reference does the counting: the test above holds the kernels to its decisions.
    cases = PREFILL if phase == "prefill" else DECODE
    name = "skip" if phase == "prefill" else "skip_decode"
    with_tiles = [
        case
        for case in cases
        if case.inputs == "topical" and getattr(case, name) not in ("none", "given", "count_only")
    ]
    some = 0
    for case in with_tiles:
        setup = build(case, DEVICE)
        with torch.no_grad():
            output = attention_reference(*setup.qkv, **setup.options, plan=setup.plan)
        counts = getattr(output, phase)
        some += 0 < int(counts.skipped[0].sum()) < int(counts.visible.sum())
    assert len(with_tiles) >= 40
    assert some >= share * len(with_tiles), f"{some} of {len(with_tiles)}"

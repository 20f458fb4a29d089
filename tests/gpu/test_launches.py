"""Every launch that the tables or their thriftier kin can pick decides and computes the same."""

from __future__ import annotations

import pytest
import torch

from modelopt_sparse.errors import UnsupportedCall
from modelopt_sparse.kernels import attention_varlen, backward, decode, prefill
from modelopt_sparse.kernels.launch import (
    Launch,
    backward_launch,
    decode_launch,
    may_be_late,
    prefill_launch,
    thriftier,
)
from tests.gpu.build import build
from tests.gpu.calls import (
    DEVICE,
    KINDS,
    assert_same_bits,
    needs_cuda,
    results,
    run,
    trained,
    without_hopper,
)
from tests.gpu.cases import Case
from tests.gpu.checks import check

pytestmark = needs_cuda
# Shared memory of a program: the least, and that of sm_86, sm_80 and sm_90.
CAPACITIES = (64 * 1024, 99 * 1024, 163 * 1024, 227 * 1024)
ITEMSIZE = {"fp16": 2, "bf16": 2, "fp32": 4}
CASES = {
    "skip 64": Case(0, 3, "ragged", "bf16", (64, 64), (4, 2), skip="on"),
    "skip 128": KINDS["skip"],
    "skip 256": Case(0, 3, "ragged", "fp16", (256, 256), (4, 2), skip="on", blocks=(64, 32)),
    "skip small tiles": Case(0, 3, "chunk", "fp16", (128, 128), (4, 2), skip="on", blocks=(16, 16)),
    "skip tall tiles": Case(
        0, 3, "ragged", "fp16", (128, 128), (4, 2), skip="on", blocks=(128, 64)
    ),
    "skip fp32": Case(0, 5, "chunk", "fp32", (64, 64), (4, 4), skip="on"),
    "2:4+skip": KINDS["2:4+skip"],
    "given": KINDS["given"],
}
DECODING = {name: KINDS[name] for name in ("decode", "decode_per_head")}


def launches_of(case: Case) -> list[Launch]:
    decides = case.skip == "on"
    decision = case.blocks if decides or case.skip == "given" else None
    found = {}
    for capacity in CAPACITIES:
        best = prefill_launch(
            case.dims, ITEMSIZE[case.dtype], case.nm is not None, decision, decides, 0, capacity
        )
        late = may_be_late(case.dims[1])
        found |= dict.fromkeys(thriftier(best, *(decision or (16, 16)), may_be_late=late))
    return list(found)


def decode_launches_of(case: Case) -> list[Launch]:
    members = 1 if case.skip_decode == "per_head" else case.heads[0] // case.heads[1]
    found = {}
    for capacity in CAPACITIES:
        best = decode_launch(case.dims, ITEMSIZE[case.dtype], members, case.segments[0], capacity)
        found |= dict.fromkeys(thriftier(best, best.block_m, best.block_n))
    return list(found)


def fixed(monkeypatch, module, launch: Launch) -> None:
    """The module launches its kernel so, or not at all."""
    monkeypatch.setattr(module, "thriftier", lambda *_, **__: [launch])


def assert_same(found: dict, wanted: dict) -> None:
    measured = ("out", "lse", "dropped_mass", "dropped_mass_bound")
    decided = [name for name in wanted if name not in measured]
    assert_same_bits({x: found[x] for x in decided}, {x: wanted[x] for x in decided})
    for name in ("out", "lse"):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-2, atol=4e-3)


@pytest.mark.parametrize(
    ("name", "launch"),
    [pytest.param(n, x, id=f"{n}-{x}") for n, case in CASES.items() for x in launches_of(case)],
)
def test_prefill_decides_the_same_however_it_is_launched(name, launch, monkeypatch):
    setup = build(CASES[name], DEVICE)
    with torch.no_grad():
        wanted = results(run(setup, details=True))
        without_hopper(monkeypatch)
        fixed(monkeypatch, prefill, launch)
        try:
            found = results(run(setup, details=True))
        except UnsupportedCall:
            pytest.skip("more than this GPU has")
    assert_same(found, wanted)


@pytest.mark.parametrize(
    ("name", "launch"),
    [
        pytest.param(n, x, id=f"{n}-{x}")
        for n, case in DECODING.items()
        for x in decode_launches_of(case)
    ],
)
def test_decode_decides_the_same_however_it_is_launched(name, launch, monkeypatch):
    setup = build(DECODING[name], DEVICE)
    with torch.no_grad():
        wanted = results(run(setup, details=True))
        fixed(monkeypatch, decode, launch)
        found = results(run(setup, details=True))
    assert_same(found, wanted)


@pytest.mark.parametrize("blocks", [(128, 64), (64, 128), (64, 64)], ids=str)
@pytest.mark.parametrize("dims", [(16, 16), (32, 32), (64, 32), (128, 32), (32, 64)], ids=str)
def test_narrow_heads_are_as_near_to_the_reference_as_plain_attention(dims, blocks):
    check(
        build(Case(0, 3, "ragged", "bf16", dims, (4, 2), skip="on", blocks=blocks), DEVICE),
        attention_varlen,
    )


@pytest.mark.parametrize("dims", [(16, 16), (32, 32), (64, 32)], ids=str)
@pytest.mark.parametrize("skip", ["none", "on"])
def test_many_narrow_rows_that_decode_together(skip, dims):
    """64 rows in a program, and more."""
    case = Case(0, 3, "draft", "bf16", dims, (8, 1), skip_decode=skip)
    check(build(case, DEVICE), attention_varlen)


def backward_launches_of(case: Case) -> list[Launch]:
    decision = case.blocks if case.skip in ("on", "given") else None
    found = {}
    for capacity in CAPACITIES:
        for best in backward_launch(
            case.dims, ITEMSIZE[case.dtype], case.nm is not None, decision, 0, capacity
        ):
            found |= dict.fromkeys(thriftier(best))
    # Late values mean nothing there.
    return [launch for launch in found if not launch.late_values]


@pytest.mark.parametrize("name", ["skip 64", "skip 128", "2:4+skip", "given"])
def test_gradients_are_the_same_however_they_are_launched(name, monkeypatch):
    case = CASES[name]
    setup = build(case, DEVICE)
    wanted = trained(setup)
    ran = 0
    for launch in backward_launches_of(case):
        fixed(monkeypatch, backward, launch)
        try:
            found = trained(setup)
        except UnsupportedCall:
            continue
        ran += 1
        for x in ("dq", "dk", "dv"):
            size = float(wanted[x].float().square().mean().sqrt())
            torch.testing.assert_close(found[x], wanted[x], rtol=2e-2, atol=0.05 * size, msg=x)
    assert ran >= 3

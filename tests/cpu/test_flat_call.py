"""A call that is taken apart for an operator is put together as it was."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import pytest
import torch

from modelopt_sparse.kernels import (
    NMSparsity,
    Phase,
    Plan,
    ScoreGrid,
    Seqs,
    SkipSoftmax,
    SkipSoftmaxDecode,
    TileMap,
)
from modelopt_sparse.kernels.check import Call
from modelopt_sparse.kernels.flat import flatten, unflatten

SEQS = Seqs.from_lengths([18, 2], [30, 40])
LAMBDAS = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
STARTS = torch.tensor([1, 2]).int()
MASK = ScoreGrid(torch.ones(2, 1, 20, 50, dtype=torch.bool), STARTS, None)
BIAS = ScoreGrid(torch.zeros(2, 2, 20, 50), None, STARTS)
TILES = TileMap.from_kept([None, None], SEQS, True, 16, 32, rows=20, heads=2)

PLANS = {
    "dense": Plan(),
    "2:4": Plan(NMSparsity(2, 4, 7, 9)),
    "skip": Plan(
        skip=SkipSoftmax(0.0, 16, 32, (0.5, 0.25), True),
        skip_decode=SkipSoftmaxDecode(LAMBDAS, 16, 64, 2, (0.125,), True),
    ),
    "lambdas": Plan(
        NMSparsity(4, 8), SkipSoftmax(LAMBDAS), SkipSoftmaxDecode(0.5, count_thresholds=(0.1, 1.0))
    ),
    "counted": Plan(skip=SkipSoftmax(None, count_thresholds=(0.5,))),
    "histograms": Plan(
        skip=SkipSoftmax(None, histogram=True),
        skip_decode=SkipSoftmaxDecode(0.5, 16, 64, None, (0.1,), histogram=True),
    ),
    "given": Plan(tiles=TILES),
}
OPTIONS = {
    "": {},
    "numbers": {"scale": 0.25, "softcap": 30.0, "window": 5, "details": True},
    "sinks": {"sinks": torch.ones(2), "phase": Phase.PREFILL},
    "bounds": {"bounds": torch.tensor([[0, 30]] * 20).int(), "causal": False},
    "grids": {"mask": MASK, "bias": BIAS},
    "mask": {"mask": MASK, "phase": Phase.DECODE},
    "pages": {"block_tables": (torch.ones(2, 3).int(), torch.zeros(2, 3).int())},
}


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return a is b
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if is_dataclass(a):
        return type(a) is type(b) and all(
            same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)
        )
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_call_comes_back_as_it_was(plan, options):
    q, k, v = torch.zeros(20, 2, 16), torch.zeros(70, 1, 16), torch.zeros(70, 1, 16)
    if plan.tiles is not None:
        phase, causal = options.get("phase"), options.get("causal", True)
        plan = Plan(tiles=replace(plan.tiles, phase=phase, causal=causal))
    call = Call(q, k, v, SEQS, plan, **{"scale": 0.5} | options)
    flat = flatten(call)
    assert all(type(x) is int for x in flat.ints) and all(type(x) is float for x in flat.floats)
    assert all(isinstance(x, torch.Tensor) for x in flat.tensors)
    found = unflatten(*flat)
    for name in Call._fields:
        assert same(getattr(found, name), getattr(call, name)), name

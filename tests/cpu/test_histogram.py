"""Tiles by the lambda at which they fall: one pass tells what every lambda would skip."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modelopt_sparse.kernels import (
    Plan,
    SkipSoftmax,
    SkipSoftmaxDecode,
    attention_reference,
    attention_triton,
)
from modelopt_sparse.kernels import prefill as prefill_launches
from modelopt_sparse.kernels.device.bins import BINS, BINS_PER_OCTAVE
from modelopt_sparse.kernels.types import TileCounts
from modelopt_sparse.stats import PhaseStats
from tests.inputs import features, needs_interpreter, topical
from tests.thinned import thinned

EDGES = (0, 1, 2, 7, 8, 17, 40, 90)
AT_EDGES = tuple(2.0 ** (-edge / BINS_PER_OCTAVE) for edge in EDGES)
ENTRIES = [attention_reference, pytest.param(attention_triton, marks=needs_interpreter)]
SMALL = {"heads": 2, "kv_heads": 1, "dtype": torch.float32}


def prefill(threshold=None, **more) -> Plan:
    return Plan(skip=SkipSoftmax(threshold, 16, 16, AT_EDGES, histogram=True, **more))


def decode(threshold=None, **more) -> Plan:
    skip = SkipSoftmaxDecode(threshold, 16, 64, count_thresholds=AT_EDGES, histogram=True, **more)
    return Plan(skip_decode=skip)


def check_edges(counts: TileCounts) -> None:
    """At the lower edge of a bin, what is above it falls: so says the count of that lambda too."""
    assert counts.histogram.shape == (BINS, len(counts.visible))
    assert torch.equal(counts.histogram.sum(0), counts.visible)
    for row, edge in zip(counts.skipped[1:], EDGES, strict=True):
        assert torch.equal(counts.histogram[edge + 1 :].sum(0), row), edge
    fallen = counts.skipped[1:].sum(1)
    assert counts.visible.sum() > fallen[0] > fallen[-1]


@thinned(2, names=["", "full", "wide_window sinks", "tile_mask", "bias softcap"])
@pytest.mark.parametrize("attend", ENTRIES)
def test_prefill(attend, names):
    inputs = topical([23, 0, 37], [75, 9, 100], strength=9.0, **SMALL)
    output = attend(*inputs.qkv, plan=prefill(), **features(names, inputs, seed=1))
    check_edges(output.prefill)


@pytest.mark.parametrize("vote_heads", [None, 1])
@pytest.mark.parametrize("attend", ENTRIES)
def test_decode_of_heads_that_are_no_power_of_two(attend, vote_heads):
    inputs = topical([1, 1], [300, 90], strength=9.0, heads=6, kv_heads=2, dtype=torch.float32)
    output = attend(*inputs.qkv, plan=decode(vote_heads=vote_heads))
    check_edges(output.decode)
    if vote_heads is None:
        groups = output.decode.histogram.view(BINS, 2, 3)
        assert (groups == groups[..., :1]).all() and (groups[:, 0] != groups[:, 1]).any()


@needs_interpreter
@pytest.mark.parametrize(("rows", "keys", "n"), [(16, 16, 130), (64, 128, 900)])
def test_the_kernel_and_the_reference_agree(rows, keys, n):
    inputs = topical([70, 1, 40], [n, n, 60], strength=9.0, **SMALL)
    plan = Plan(
        skip=SkipSoftmax(None, rows, keys, histogram=True),
        skip_decode=SkipSoftmaxDecode(None, keys, 4 * keys, histogram=True),
    )
    ours, wanted = (f(*inputs.qkv, plan=plan) for f in (attention_triton, attention_reference))
    for phase in ("prefill", "decode"):
        found, expected = getattr(ours, phase).histogram, getattr(wanted, phase).histogram
        assert torch.equal(found, expected)
        assert expected[0].sum() > 0 and expected[1:].sum() > 0


@pytest.mark.parametrize("plan", [prefill, decode])
@pytest.mark.parametrize("attend", ENTRIES)
def test_the_lambda_in_force_changes_no_bin_and_counting_no_output(attend, plan):
    inputs = topical([40 if plan is prefill else 1], [150], strength=9.0, **SMALL)
    phase = plan.__name__
    only = attend(*inputs.qkv, plan=plan())
    dense = attend(*inputs.qkv)
    assert torch.equal(only.out, dense.out) and torch.equal(only.lse, dense.lse)
    skipping = getattr(attend(*inputs.qkv, plan=plan(0.5)), phase)
    assert 0 < skipping.skipped[0].sum() < skipping.visible.sum()
    assert torch.equal(skipping.histogram, getattr(only, phase).histogram)


@pytest.mark.parametrize("attend", ENTRIES)
def test_keys_that_are_not_numbers_are_counted_as_they_are_decided_upon(attend):
    inputs = topical([40], [150], strength=9.0, **SMALL)
    k = inputs.k.clone()
    k[96:112] = torch.nan
    check_edges(attend(inputs.q, k, inputs.v, inputs.seqs, plan=prefill()).prefill)


@needs_interpreter
def test_a_call_that_wants_gradients_counts_the_same():
    inputs = topical([40, 1], [150, 70], strength=9.0, **SMALL)
    plan = replace(prefill(0.5), skip_decode=decode(0.5).skip_decode)
    wanted = attention_triton(*inputs.qkv, plan=plan)
    q = inputs.q.clone().requires_grad_()
    found = attention_triton(q, inputs.k, inputs.v, inputs.seqs, plan=plan)
    for phase in ("prefill", "decode"):
        assert torch.equal(getattr(found, phase).histogram, getattr(wanted, phase).histogram)


def test_counts_of_two_calls_are_added():
    one = TileCounts(torch.tensor([3]), torch.tensor([[1]]), torch.ones(BINS, 1).long())
    both = one + one
    assert both.visible.tolist() == [6] and both.skipped.tolist() == [[2]]
    assert both.histogram.sum() == 2 * BINS


def test_statistics_start_over_when_a_histogram_comes_or_goes():
    one = TileCounts(torch.tensor([3]), torch.tensor([[1]]), torch.ones(BINS, 1).long())
    stats = PhaseStats()
    for counts, calls in ((one, 1), (one, 2), (replace(one, histogram=None), 1), (one, 1)):
        stats.add(counts)
        assert stats.calls == calls and stats.counts.visible.tolist() == [3 * calls]
    assert torch.equal(stats.counts.histogram, one.histogram)


@needs_interpreter
def test_what_counts_leaves_the_decisions_of_what_computes_alone(monkeypatch):
    """As where one kernel computes, and another counts beside it."""

    def refusals(call):
        skip = call.plan.skip
        return iter(("counting",) if skip.histogram or skip.count_thresholds else ())

    def compute(call, results, only_prefill):
        for tensor in (results.out, results.lse, results.bound, results.dropped):
            tensor.zero_()
        results.words.bitwise_or_(1)  # as kernels add bits
        results.prefill[:2] += torch.tensor([[3], [2]])

    inputs = topical([40], [150], strength=9.0, **SMALL)
    wanted = attention_triton(*inputs.qkv, plan=prefill()).prefill
    monkeypatch.setattr(prefill_launches, "prefill_refusals", refusals)
    monkeypatch.setattr(prefill_launches, "launch_hopper_prefill", compute)
    found = attention_triton(*inputs.qkv, plan=prefill(0.5), details=True)
    assert (found.tiles.words == 1).all()
    assert found.prefill.visible.tolist() == [3, 3] and found.prefill.skipped[0].tolist() == [2, 2]
    assert torch.equal(found.prefill.histogram, wanted.histogram)
    assert torch.equal(found.prefill.skipped[1:], wanted.skipped[1:])

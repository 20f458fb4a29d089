"""Sequences below a context are dense, whatever else is in their batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import modelopt_sparse as mtsa
from modelopt_sparse.errors import ArgumentError, ArgumentTypeError
from modelopt_sparse.kernels import Plan, SkipSoftmax, SkipSoftmaxDecode, attention_varlen
from tests.cpu import tiny
from tests.inputs import topical

LENGTHS = [200, 300, 299]
LAMBDAS = {"number": 0.1, "tensor": torch.full((3, 1), 0.1)}


def plans(threshold, least):
    skip = SkipSoftmax(threshold, 32, 32, min_context=least)
    decode = SkipSoftmaxDecode(threshold, 32, 128, min_context=least)
    return Plan(skip=skip, skip_decode=decode)


def inputs_of(rows):
    return topical(rows, LENGTHS, dim=16, strength=6.0, span=32)


def attend(inputs, plan, **options):
    return attention_varlen(inputs.q, inputs.k, inputs.v, inputs.seqs, plan=plan, **options)


@pytest.mark.parametrize("threshold", LAMBDAS.values(), ids=LAMBDAS)
@pytest.mark.parametrize("rows", [LENGTHS, [1, 1, 1]], ids=["prefill", "decode"])
def test_short_sequences_keep_every_tile_and_long_ones_what_they_keep_anyway(rows, threshold):
    inputs = inputs_of(rows)
    found = attend(inputs, plans(threshold, 300), details=True)
    anyway = attend(inputs, plans(threshold, 0), details=True)
    dense = attend(inputs, Plan())
    starts = inputs.seqs.q_start.tolist()
    for b, (n, start) in enumerate(zip(LENGTHS, starts, strict=True)):
        mine = slice(start, start + rows[b])
        wanted = anyway if n >= 300 else dense
        torch.testing.assert_close(found.out[mine], wanted.out[mine])
        if n >= 300:
            assert torch.equal(found.kept[b], anyway.kept[b])
    counts = [getattr(x, "decode" if rows[0] == 1 else "prefill") for x in (found, anyway)]
    assert 0 < counts[0].skipped.sum() < counts[1].skipped.sum()
    assert torch.equal(counts[0].visible, counts[1].visible)


@pytest.mark.parametrize("rows", [LENGTHS, [1, 1, 1]], ids=["prefill", "decode"])
def test_a_call_of_short_sequences_is_dense_and_counts_nothing(rows):
    inputs = inputs_of(rows)
    found, dense = attend(inputs, plans(0.1, 301), details=True), attend(inputs, Plan())
    assert torch.equal(found.out, dense.out) and torch.equal(found.lse, dense.lse)
    assert found.prefill is found.decode is found.tiles is found.decode_tiles is None


@pytest.mark.parametrize("part", ["skip", "skip_decode"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(-1, ArgumentError), *((x, ArgumentTypeError) for x in ("8k", "", None, False, 0.0))],
)
def test_other_contexts_are_refused(part, value, error):
    plan = plans(0.1, 0)
    plan = replace(plan, **{part: replace(getattr(plan, part), min_context=value)})
    with pytest.raises(error, match="min_context"):
        attend(inputs_of(LENGTHS), plan)


def test_a_model_skips_from_its_context_on():
    model = tiny.tiny_llama()
    prompts = torch.arange(200)[None] % 50, torch.arange(400)[None] % 50
    with torch.no_grad():
        dense = [model(prompt).logits for prompt in prompts]
        rule = {"method": "triton_skip_softmax", "skip_softmax_threshold": 0.9, "min_context": 300}
        mtsa.sparsify(model, {"sparse_cfg": {"*": rule}})
        short = model(prompts[0]).logits
        assert all(entry["prefill"] is None for entry in mtsa.get_stats(model).values())
        torch.testing.assert_close(short, dense[0])
        model(prompts[1])
    assert any(entry["prefill"]["sparsity"] > 0 for entry in mtsa.get_stats(model).values())

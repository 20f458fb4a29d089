"""Further thresholds are counted without being applied, whether one is in force or none."""

from __future__ import annotations

import pytest
import torch

from modelopt_sparse.kernels import DENSE, Plan, SkipSoftmax, SkipSoftmaxDecode, attention_varlen
from tests.inputs import topical

COUNTED = (0.9, 0.5, 0.1)


@pytest.mark.parametrize("threshold", [None, 0.0, -0.0], ids=repr)
@pytest.mark.parametrize(
    ("q_lens", "phase", "plan"),
    [
        ([90], "prefill", lambda t: Plan(skip=SkipSoftmax(t, 16, 16, COUNTED))),
        ([1], "decode", lambda t: Plan(skip_decode=SkipSoftmaxDecode(t, 16, 64, None, COUNTED))),
    ],
    ids=["prefill", "decode"],
)
def test_counting_alone_leaves_the_output_dense_to_the_bit(q_lens, phase, plan, threshold):
    inputs = topical(q_lens, [90])
    tensors = (inputs.q, inputs.k, inputs.v, inputs.seqs)
    dense = attention_varlen(*tensors, plan=DENSE)
    counted = attention_varlen(*tensors, plan=plan(threshold))
    assert torch.equal(counted.out, dense.out)
    assert torch.equal(counted.lse, dense.lse)

    counts = getattr(counted, phase)
    in_force, *others = counts.skipped.sum(-1).tolist()
    assert in_force == 0
    assert others == sorted(others, reverse=True) and others[0] > 0
    for row, value in enumerate(COUNTED, start=1):
        applied = getattr(attention_varlen(*tensors, plan=plan(value)), phase)
        assert torch.equal(counts.skipped[row], applied.skipped[0])

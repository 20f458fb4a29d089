"""Partial results, merged: those of all keys at once."""

from __future__ import annotations

import math

import pytest
import torch

from modelopt_sparse import ArgumentError
from modelopt_sparse.kernels import (
    Plan,
    Seqs,
    SkipSoftmaxDecode,
    attention_varlen,
    merge_states,
)
from tests.inputs import topical

CUTS = [(0, 300), (300, 450), (450, 450), (450, 700)]


def parts_of(inputs, plan, causal=False):
    found = []
    for start, stop in CUTS:
        seqs = Seqs.from_lengths([1], [stop - start])
        k, v = inputs.k[start:stop], inputs.v[start:stop]
        found.append(attention_varlen(inputs.q, k, v, seqs, causal=causal, plan=plan))
    return [part.out for part in found], [part.lse for part in found]


def test_parts_of_the_keys_merge_to_all_of_them():
    inputs = topical([1], [700], gaps=False)
    whole = attention_varlen(*inputs.qkv)
    out, lse = merge_states(*parts_of(inputs, Plan()))
    torch.testing.assert_close(out, whole.out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, whole.lse, rtol=1e-12, atol=1e-12)


def test_parts_that_skip_merge_to_the_dense_lse_with_an_exact_normalizer():
    inputs = topical([1], [700], gaps=False, strength=9.0)
    dense = attention_varlen(*inputs.qkv)
    lses = {}
    for exact in (False, True):
        plan = Plan(skip_decode=SkipSoftmaxDecode(0.3, 16, 64, exact_normalizer=exact))
        assert all(
            part.decode.skipped.sum() > 0 for part in [attention_varlen(*inputs.qkv, plan=plan)]
        )
        lses[exact] = merge_states(*parts_of(inputs, plan))[1]
    torch.testing.assert_close(lses[True], dense.lse, rtol=1e-12, atol=1e-12)
    assert (lses[False] < dense.lse - 1e-6).any()


def test_rows_that_see_nothing_anywhere_stay_empty_whatever_their_outs_hold():
    outs = [torch.full((2, 3, 4), math.nan), torch.ones(2, 3, 4)]
    lses = [torch.full((2, 3), -math.inf), torch.tensor([[-math.inf] * 3, [2.0] * 3])]
    out, lse = merge_states(outs[:1], lses[:1])
    assert (out == 0).all() and (lse == -math.inf).all()
    out, lse = merge_states(outs, lses)
    assert (out[0] == 0).all() and (out[1] == 1).all()
    assert lse.tolist() == lses[1].tolist()


def test_a_large_lse_does_not_overflow_and_the_dtype_stays():
    out, lse = merge_states([torch.ones(1, 2).half()] * 2, [torch.full((1,), 3e4)] * 2)
    assert out.dtype == torch.float16 and out.tolist() == [[1.0, 1.0]] and lse.tolist() == [30001.0]


@pytest.mark.parametrize(
    ("outs", "lses"),
    [([], []), ([(2, 4)], []), ([(2, 4), (3, 4)], [(2,), (2,)]), ([(2, 4)], [(2, 4)])],
    ids=str,
)
def test_parts_that_do_not_fit_are_refused(outs, lses):
    with pytest.raises(ArgumentError):
        merge_states([torch.zeros(x) for x in outs], [torch.zeros(x) for x in lses])

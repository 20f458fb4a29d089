"""The oracle itself, against scaled_dot_product_attention and against examples worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from modelopt_sparse.kernels.types import (
    NMSparsity,
    Phase,
    Plan,
    ScoreGrid,
    Seqs,
    SkipSoftmax,
    SkipSoftmaxDecode,
)
from tests.inputs import EXACT_SCALE, topical
from tests.oracle import oracle


def line(queries, keys, values=None):
    """One head of dimension 1, so that with EXACT_SCALE a score is query * key."""

    def column(numbers):
        return torch.tensor(numbers, dtype=torch.float64).reshape(-1, 1, 1)

    seqs = Seqs.from_lengths([len(queries)], [len(keys)])
    return column(queries), column(keys), column(keys if values is None else values), seqs


def kept_tiles(queries, keys, plan, **options):
    result = oracle(*line(queries, keys), plan=plan, scale=EXACT_SCALE, **options)
    return result.kept[0][0].astype(int).tolist()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n_q", "n_k"), [(5, 5), (3, 17), (1, 9)])
def test_dense_oracle_equals_sdpa(n_q, n_k, causal):
    inputs = topical([n_q, n_q + 1], [n_k, n_k + 2])
    result = oracle(*inputs.qkv, causal=causal)
    for b, (rows, keys) in enumerate(((n_q, n_k), (n_q + 1, n_k + 2))):
        q0, k0 = int(inputs.seqs.q_start[b]), int(inputs.seqs.k_start[b])
        q = inputs.q[q0 : q0 + rows].transpose(0, 1)[None]
        k = inputs.k[k0 : k0 + keys].transpose(0, 1)[None]
        v = inputs.v[k0 : k0 + keys].transpose(0, 1)[None]
        seen = torch.ones(rows, keys, dtype=torch.bool)
        seen = seen.tril(keys - rows) if causal else seen
        wanted = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        np.testing.assert_allclose(
            result.out[q0 : q0 + rows], wanted[0].transpose(0, 1), rtol=0, atol=1e-14
        )


def test_window_bounds_mask_and_bias_of_the_oracle_hide_the_same_keys():
    inputs = topical([12], gaps=False)
    p, j = torch.arange(12)[:, None], torch.arange(12)[None]
    seen = (j <= p) & (j > p - 4)
    grid = torch.where(seen, 0.0, -math.inf).double()[None, None]
    bounds = torch.stack([(torch.arange(12) - 3).clamp(min=0), torch.arange(12) + 1], 1).int()
    wanted = oracle(*inputs.qkv, window=4)
    for options in (
        {"bounds": bounds},
        {"mask": ScoreGrid(seen[None, None]), "causal": False},
        {"bias": ScoreGrid(grid)},
    ):
        result = oracle(*inputs.qkv, **options)
        np.testing.assert_array_equal(result.out, wanted.out)
        np.testing.assert_array_equal(result.lse, wanted.lse)


def test_softcap_and_sinks_of_the_oracle_follow_their_formulas():
    q, k, v, seqs = line([1.0], [2.0, 0.5])
    scores = 3 * np.tanh(np.array([2.0, 0.5]) / 3)
    weights = np.exp(scores)
    total = weights.sum() + math.exp(0.7)
    result = oracle(
        q, k, v, seqs, scale=1.0, softcap=3.0, sinks=torch.tensor([0.7], dtype=torch.float64)
    )
    assert result.out[0, 0, 0] == pytest.approx((weights @ [2.0, 0.5]) / total, abs=1e-15)
    assert result.lse[0, 0] == pytest.approx(math.log2(total), abs=1e-15)


def test_ties_in_a_group_leave_the_lower_index():
    result = oracle(
        *line([1, 1], [1, 1, 1, 1, 0, 2, 2, 2]),
        scale=EXACT_SCALE,
        causal=False,
        plan=Plan(nm=NMSparsity(2, 4, 0, 0)),
    )
    assert result.left[0][0, 0].astype(int).tolist() == [1, 1, 0, 0, 0, 1, 1, 0]
    assert result.nm_ties > 0


def test_sinks_and_window_stay_and_still_compete():
    keys = [9, 1, 2, 3, 1, 2, 9, 8]
    result = oracle(*line([1] * 8, keys), scale=EXACT_SCALE, plan=Plan(nm=NMSparsity(1, 4, 1, 2)))
    # row 7 (p = 7): group 0 leaves key 0, which is a sink too; group 1 leaves key 6, window 6 and 7
    assert result.left[0][0, 7].astype(int).tolist() == [1, 0, 0, 0, 0, 0, 1, 1]
    # row 5: group 1 has only keys 4 and 5 visible; the window is both of them
    assert result.left[0][0, 5].astype(int).tolist() == [1, 0, 0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [(0.25, [1, 1, 1, 1, 1]), (0.5, [1, 1, 1, 1, 1]), (1.0, [0, 1, 0, 1, 1])],
)
def test_prefill_visits_last_first_then_downward_and_ties_keep(threshold, kept):
    # visited: 1 (kept), 0, 4, 3, 5; at 0.5 the tests 0 < 1 - 1 and 3 < 4 - 1 are ties
    plan = Plan(skip=SkipSoftmax(threshold, block_rows=2, block_keys=1))
    assert kept_tiles([1, 1], [0, 5, 3, 4, 1], plan, causal=False) == [kept]


def test_every_row_that_sees_something_must_agree_to_a_skip():
    plan = Plan(skip=SkipSoftmax(1.0, block_rows=4, block_keys=1))
    # rows 1, 1 skip the low middle key; a row with query -1 finds it high
    assert kept_tiles([1, 1], [5, 0, 5], plan, causal=False) == [[1, 0, 1]]
    assert kept_tiles([1, -1], [5, 0, 5], plan, causal=False) == [[1, 1, 1]]
    # the second row does not see it, so it has no vote
    bounds = torch.tensor([[0, 3], [2, 3]], dtype=torch.int32)
    assert kept_tiles([1, -1], [5, 0, 5], plan, causal=False, bounds=bounds) == [[1, 0, 1]]


def test_row_tiles_are_anchored_at_position_zero():
    plan = Plan(skip=SkipSoftmax(1.0, block_rows=4, block_keys=4))
    # 3 rows at positions 6, 7, 8: the first two share a tile, the third is alone in the next
    keys = [5, 5, 5, 5, 0, 0, 0, 0, 9]
    assert kept_tiles([1, 1, 1], keys, plan) == [[1, 1, 0], [0, 0, 1]]


def test_decode_segments_start_from_the_seed_and_go_downward():
    def decode(threshold, **more):
        part = SkipSoftmaxDecode(threshold, block_keys=1, segment_keys=2, **more)
        return kept_tiles([1], [2, 0, 5, 1, 3, 3], Plan(skip_decode=part))

    # seed max(2, 3) = 3; a running max carried over from the segment with 5 would drop key 0 at 0.5
    assert decode(0.5) == [[1, 0, 1, 0, 1, 1]]
    assert decode(1.0) == [[0, 0, 1, 0, 1, 1]]
    # within a segment the running max counts: 4 of [4, 5] is visited after 5
    part = SkipSoftmaxDecode(1.0, block_keys=1, segment_keys=2)
    assert kept_tiles([1], [4, 5, 1, 1], Plan(skip_decode=part)) == [[0, 1, 0, 0]]


@pytest.mark.parametrize(
    ("per_head", "kept"), [(False, [[1, 1, 1]] * 2), (True, [[1, 0, 1], [0, 1, 1]])]
)
def test_heads_of_a_group_vote_together_or_alone(per_head, kept):
    q = torch.tensor([1.0, -1.0]).double().reshape(1, 2, 1)
    _, k, v, seqs = line([1], [5, 0, 5])
    part = SkipSoftmaxDecode(1.0, block_keys=1, segment_keys=4, vote_heads=1 if per_head else None)
    result = oracle(q, k, v, seqs, scale=EXACT_SCALE, plan=Plan(skip_decode=part))
    assert result.kept[0][:, 0].astype(int).tolist() == kept
    assert result.decode.visible.tolist() == [3, 3]


def test_dropped_mass_and_the_exact_normaliser():
    q, k, v, seqs = line([1], [3, 0, 3], [1, 7, 2])
    q, seqs = q.repeat(2, 1, 1), Seqs.from_lengths([2], [3])
    for exact in (False, True):
        part = SkipSoftmax(0.5, 2, 1, exact_normalizer=exact)
        result = oracle(q, k, v, seqs, scale=EXACT_SCALE, causal=False, plan=Plan(skip=part))
        total = 17 if exact else 16
        assert result.out[0, 0, 0] == pytest.approx(24 / total, abs=1e-15)
        assert result.lse[0, 0] == pytest.approx(math.log2(total), abs=1e-15)
        assert result.dropped[0, 0] == pytest.approx(1 / 17, abs=1e-15)


def test_rows_that_see_nothing_and_other_thresholds():
    part = SkipSoftmax(0.5, 2, 1, count_thresholds=(0.25, 1.0))
    result = oracle(
        *line([1, 1], [0, 5, 3, 4, 1]), scale=EXACT_SCALE, causal=False, plan=Plan(skip=part)
    )
    assert result.prefill.skipped.tolist() == [[0], [0], [2]]
    empty = oracle(*line([1, 1, 1], [4]), scale=EXACT_SCALE)
    assert empty.lse[:, 0].tolist() == [-math.inf, -math.inf, 4.0]
    assert empty.out[:, 0, 0].tolist() == [0, 0, 4]


def test_a_threshold_tensor_is_clamped_and_nan_keeps():
    for value, kept in (
        (7.0, [1, 0, 1]),
        (-1.0, [1, 1, 1]),
        (math.nan, [1, 1, 1]),
        (0.0, [1, 1, 1]),
    ):
        part = SkipSoftmax(torch.tensor([[value]]), 2, 1)
        assert kept_tiles([1, 1], [3, 0, 3], Plan(skip=part), causal=False) == [kept]
    # 4 at a running max of 3: skipped if 64 were taken at its word
    part = SkipSoftmax(torch.tensor([[64.0]]), 2, 1)
    assert kept_tiles([1, 1], [3, 4, 3], Plan(skip=part), causal=False) == [[1, 1, 1]]


def test_a_lone_query_row_decodes_unless_told_otherwise():
    plan = Plan(nm=NMSparsity(1, 4, 0, 0))
    assert oracle(*line([1], [1, 2, 3, 4]), plan=plan).left[0].sum() == 4
    assert oracle(*line([1], [1, 2, 3, 4]), plan=plan, phase=Phase.PREFILL).left[0].sum() == 1
    assert (
        oracle(*line([1, 1], [1, 2, 3, 4]), plan=plan, phase=Phase.DECODE).left[0][0, 1].sum() == 4
    )

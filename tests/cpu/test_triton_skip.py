"""Skip-softmax of the Triton kernels in Triton's interpreter, against the oracle: kept sets bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

from modelopt_sparse.kernels import (
    NMSparsity,
    Phase,
    Plan,
    SkipSoftmax,
    SkipSoftmaxDecode,
    attention_triton,
)
from modelopt_sparse.kernels.arguments import counted_thresholds
from tests.inputs import EXACT_SCALE, check, features, integers, needs_interpreter, topical
from tests.inputs import check_skips as check_skips_of
from tests.thinned import thinned

pytestmark = needs_interpreter

TILES = [(16, 16), (64, 128), (128, 32), (32, 64)]
TILE_IDS = [f"{rows}x{keys}" for rows, keys in TILES]
DTYPES = [torch.float32, torch.float16]
FEATURES = [
    "", "full", "wide_window", "softcap", "sinks", "bounds", "full bounds", "tile_mask", "bias",
    "head_bias", "wide_window sinks bias", "tile_mask sinks softcap",
]  # fmt: skip
COUNTED = (0.001, 0.03, 0.5, 1.0)


def prefill(threshold=0.1, rows=16, keys=16, counted=(), nm=None, **more):
    return Plan(nm, SkipSoftmax(threshold, rows, keys, counted, **more))


def decode(threshold=0.1, keys=16, segment=64, **more):
    return Plan(skip_decode=SkipSoftmaxDecode(threshold, keys, segment, **more))


def small(make, q_lens, k_lens, **more):
    return make(q_lens, k_lens, **{"heads": 2, "kv_heads": 1, "dtype": torch.float32} | more)


def check_skips(inputs, plan, phases=("prefill",), **options):
    return check_skips_of(inputs, plan, phases, attention_triton, **options)


@thinned(2, tile=TILES, dtype=DTYPES)
def test_prefill_keeps_the_tiles_of_the_oracle_ties_included(tile, dtype):
    rows, keys = tile
    q_lens, k_lens = ([70, 1, 20], [5 * keys, 30, 4 * keys]) if keys < 128 else ([70], [600])
    inputs = small(integers, q_lens, k_lens, span=keys, dtype=dtype)
    plan = prefill(0.5, rows, keys, COUNTED)
    _, wanted = check_skips(inputs, plan)
    assert wanted.ties > 0


@thinned(4, names=FEATURES, exact={"": False, "exact": True})
def test_prefill_skips_with_every_feature(names, exact):
    q_lens, k_lens = [23, 0, 5], [75, 9, 60]
    inputs = small(topical, q_lens, k_lens, strength=9.0, dtype=DTYPES[len(names) % 2])
    check_skips(inputs, prefill(exact_normalizer=exact), **features(names, inputs, seed=1))


@thinned(
    2,
    nm={"2:4": NMSparsity(2, 4, 3, 5), "1:8": NMSparsity(1, 8, 0, 0)},
    names=["", "full", "wide_window sinks", "tile_mask"],
)
def test_nm_and_skip_compose(nm, names):
    inputs = small(topical, [23, 9], [75, 50], strength=9.0, seed=2)
    plan = prefill(nm=nm, counted=COUNTED[:3], exact_normalizer=names == "full")
    check_skips(inputs, plan, **features(names, inputs, seed=1))


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2)], ids=["3", "4kv2"])
def test_prefill_skips_in_other_layouts(heads, kv_heads):
    more = {"heads": heads, "kv_heads": kv_heads, "dim": 24, "dim_v": 40, "dtype": torch.float16}
    inputs = small(topical, [20, 40], [81, 40], seed=4, strength=9.0, **more)
    check_skips(inputs, prefill())


def test_rows_before_the_first_key_and_lone_rows_by_the_prefill_rule():
    inputs = small(topical, [1, 1, 60], [120, 77, 50], strength=9.0)
    check_skips(inputs, prefill(), phase=Phase.PREFILL)


@pytest.mark.parametrize("plan", [prefill, decode], ids=["prefill", "decode"])
def test_thresholds_that_are_only_counted_leave_the_dense_output(plan):
    n_q, n_k = (20, 100) if plan is prefill else (1, 140)
    inputs = small(topical, [n_q], [n_k], strength=9.0, kv_heads=2, dtype=torch.float16)
    more = {"counted" if plan is prefill else "count_thresholds": (0.5, 0.1, 0.9)}
    result = attention_triton(*inputs.qkv, plan=plan(None, **more))
    dense = attention_triton(*inputs.qkv)
    assert torch.equal(result.out, dense.out) and torch.equal(result.lse, dense.lse)
    assert (result.dropped_mass_bound == 0).all()
    counts = result.prefill if plan is prefill else result.decode
    assert counts.skipped.shape == (4, 2) and (counts.skipped[0] == 0).all()
    for row, threshold in zip(counts.skipped[1:], (0.5, 0.1, 0.9), strict=True):
        more = {"counted" if plan is prefill else "count_thresholds": (threshold,)}
        alone = check(inputs, plan(1e-30, **more), attention_triton)[1]
        wanted = alone.prefill if plan is prefill else alone.decode
        assert row.tolist() == wanted.skipped[1].tolist()
    assert counts.skipped.sum() > 0


def test_further_thresholds_are_numbers_and_not_a_tensor_that_a_graph_would_outlive():
    skip = SkipSoftmax(0.1, count_thresholds=(0.5, 0.25, 0.0))
    assert counted_thresholds(skip) == (-1.0, -2.0, -math.inf, -math.inf)
    assert counted_thresholds(SkipSoftmax(0.1)) is None
    assert counted_thresholds(None) is None


LAMBDAS = {
    "per both": torch.tensor([[0.3, 0.1, 0.9, 1.0], [1e-6, 0.0, 0.3, 0.2]]),
    "scalar": torch.tensor(0.1),
    "per sequence": torch.tensor([[0.3], [0.02]]),
    "per head": torch.tensor([0.3, 0.01, 0.0, 0.9]),
    "clamped": torch.tensor([[64.0, math.inf, -3.0, -math.inf]]),
    "nan": torch.tensor([[math.nan, -0.0, 0.3, 1.0]]),
}


@thinned(2, threshold=LAMBDAS)
def test_lambda_tensors_apply_per_sequence_and_head(threshold):
    more = {"heads": 4, "kv_heads": 2, "strength": 5.0}
    check_skips(small(topical, [20, 33], [75, 50], **more), prefill(threshold))
    inputs = small(topical, [1, 1], [150, 220], **more)
    for vote_heads in (None, 1):
        check_skips(inputs, decode(threshold, vote_heads=vote_heads), ("decode",))


def test_a_lambda_that_skips_nothing_is_dense_to_rounding():
    inputs = small(topical, [40, 1], [75, 90])
    plan = Plan(skip=prefill(1e-37).skip, skip_decode=decode(1e-37).skip_decode)
    result = attention_triton(*inputs.qkv, plan=plan)
    dense = attention_triton(*inputs.qkv)
    assert result.prefill.skipped.sum() == result.decode.skipped.sum() == 0
    torch.testing.assert_close(result.out, dense.out)
    for nothing in (None, 0, -0.0):
        plan = Plan(skip=prefill(nothing).skip, skip_decode=decode(nothing).skip_decode)
        result = attention_triton(*inputs.qkv, plan=plan)
        assert torch.equal(result.out, dense.out) and result.prefill is result.decode is None


@pytest.mark.parametrize("vote_heads", [1, 2])
def test_some_heads_of_a_group_vote_together(vote_heads):
    inputs = topical([1, 1], [200, 70], heads=8, strength=9.0, dtype=torch.float32)
    actual, _ = check_skips(inputs, decode(vote_heads=vote_heads), ("decode",))
    by_votes = actual.kept[0].unflatten(0, (-1, vote_heads))
    assert (by_votes == by_votes[:, :1]).all() and (by_votes[0] != by_votes[1]).any()


@thinned(
    3,
    names=["", "wide_window sinks", "tile_mask bias", "bounds"],
    vote_heads={"groups": None, "heads": 1},
    segment=[16, 64, 4096],
)
def test_decode_skips_the_tiles_of_the_oracle(names, vote_heads, segment):
    inputs = small(topical, [1] * 3, [200, 15, 65], heads=4, kv_heads=2, strength=9.0, seed=1)
    plan = decode(segment=segment, vote_heads=vote_heads)
    check_skips(inputs, plan, ("decode",), **features(names, inputs))


@thinned(
    2,
    layout={"3": (3, 3), "6kv2": (6, 2)},
    exact={"": False, "exact": True},
    dtype=DTYPES,
)
def test_decode_skips_in_other_layouts(layout, exact, dtype):
    heads, kv_heads = layout
    more = {"heads": heads, "kv_heads": kv_heads, "dim": 24, "dim_v": 40, "topics": 2}
    inputs = small(topical, [1] * 3, [160, 64, 90], dtype=dtype, strength=9.0, **more)
    plan = decode(exact_normalizer=exact, count_thresholds=COUNTED)
    check_skips(inputs, plan, ("decode",))


@thinned(2, vote_heads={"groups": None, "heads": 1}, segment=[16, 32, 64])
def test_decode_keeps_tiles_at_the_threshold(vote_heads, segment):
    inputs = small(integers, [1] * 4, [200, 77, 130, 60], heads=4, kv_heads=2)
    plan = decode(0.25, segment=segment, vote_heads=vote_heads, count_thresholds=(0.5, 1.0))
    _, wanted = check_skips(inputs, plan, ("decode",))
    assert wanted.ties > 0


def test_decode_takes_default_tiles_and_many_words():
    inputs = small(topical, [1], [2300], heads=1, span=16, strength=9.0, dtype=torch.float16)
    check_skips(inputs, decode(), ("decode",))
    check_skips(inputs, Plan(skip_decode=SkipSoftmaxDecode(0.9)), ("decode",))


def test_each_segment_begins_with_the_seed():
    # From the end: the seed is 0, tile 6 is 8 high, tile 5 as low as the seed, as is tile 3.
    inputs = small(integers, [1], [128], heads=1, gaps=False)
    inputs.q[:] = torch.tensor([1.0, 0, 0, 0])
    inputs.k[:] = 0
    levels = torch.tensor([0.0, -9, 0, 0, -9, 0, 8, 0])
    inputs.k[:, 0, 0] = levels.repeat_interleave(16)
    kept = {}
    for segment in (64, 128):
        actual, _ = check(inputs, decode(0.5, segment=segment), attention_triton)
        kept[segment] = actual.kept[0][0, 0].int().tolist()
    assert kept == {64: [1, 0, 1, 1, 0, 0, 1, 1], 128: [0, 0, 0, 0, 0, 0, 1, 1]}


@pytest.mark.parametrize("names", ["", "tile_mask", "full"])
def test_speculative_rows_decode_when_the_caller_says_so(names):
    inputs = small(topical, [4, 1, 3], [120, 77, 55], topics=2, strength=9.0, span=32, seed=3)
    plan = Plan(NMSparsity(1, 4, 0, 0), skip_decode=decode().skip_decode)
    options = features(names, inputs)
    check_skips(inputs, plan, ("decode",), phase=Phase.DECODE, **options)


@thinned(2, names=["tile_mask sinks", ""])
def test_a_mixed_batch_follows_each_sequence_s_phase(names):
    inputs = small(topical, [30, 1, 0, 17, 1], [60, 90, 9, 50, 140], strength=9.0)
    plan = Plan(
        NMSparsity(2, 4, 0, 0),
        prefill(counted=(0.5,)).skip,
        decode(0.2, 32, 64, exact_normalizer=True).skip_decode,
    )
    options = features(names, inputs)
    check_skips(inputs, plan, ("prefill", "decode"), **options)
    for alone, phase in (
        (Plan(skip=plan.skip), "prefill"),
        (Plan(skip_decode=plan.skip_decode), "decode"),
    ):
        actual, _ = check_skips(inputs, alone, (phase,), **options)
        assert [tiles is None for tiles in actual.kept] == [
            (n == 1) == (phase == "prefill") for n in (30, 1, 0, 17, 1)
        ]


@pytest.mark.parametrize("phase", Phase)
def test_padding_rows_have_no_vote(phase):
    # 3 rows in a tile of 16: were the other 13 counted, with their scores of 0, nothing would go
    inputs = small(integers, [3], [64], heads=1, gaps=False)
    inputs.q[:] = torch.tensor([1.0, 0, 0, 0])
    inputs.k[:] = 0
    inputs.k[:, 0, 0] = torch.tensor([-9.0, -12.0, -20.0, -8.0]).repeat_interleave(16)
    plan = prefill(0.5) if phase is Phase.PREFILL else decode(0.5)
    actual, _ = check_skips(inputs, plan, (phase.value,), phase=phase)
    assert actual.kept[0].tolist() == [[[True, False, False, True]]]


def test_a_threshold_is_not_scaled():
    # The middle tile lies 4 below: at a scale of 1/4 a scaled log2(1/8) would be 3/4.
    inputs = small(integers, [2], [48], heads=1, gaps=False)
    inputs.q[:] = torch.tensor([1.0, 0, 0, 0])
    inputs.k[:] = 0
    inputs.k[:, 0, 0] = torch.tensor([0.0, -8.0, 0.0]).repeat_interleave(16)
    for threshold, stays in ((0.25, True), (0.5, False)):
        actual, _ = check(inputs, prefill(threshold), attention_triton, scale=EXACT_SCALE / 4)
        assert actual.kept[0][0, 0].tolist() == [True, stays, True]


def test_a_kept_tile_is_whole():
    # row 0 finds the middle tile low, row 1 high: both take it whole
    inputs = small(integers, [2], [48], heads=1, gaps=False)
    inputs.q[:] = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])[:, None]
    inputs.k[:] = 0
    inputs.k[:, 0, 0] = torch.tensor([0.0, -3.0, 0.0]).repeat_interleave(16)
    inputs.k[:, 0, 1] = torch.tensor([0.0, 3.0, 0.0]).repeat_interleave(16)
    actual, wanted = check(inputs, prefill(1.0), attention_triton, causal=False)
    assert actual.kept[0].all() and wanted.dropped.max() == 0


def test_sink_logits_take_no_part_in_decisions():
    inputs = small(topical, [30, 1], [75, 150], strength=5.0)
    plan = Plan(skip=prefill().skip, skip_decode=decode().skip_decode)
    plain, _ = check_skips(inputs, plan, ("prefill", "decode"))
    heavy, _ = check(inputs, plan, attention_triton, sinks=torch.full((2,), 30.0))
    for got, wanted in zip(heavy.kept, plain.kept, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
def test_details_change_no_number(exact):
    inputs = small(topical, [30, 1], [75, 150], strength=9.0)
    plan = Plan(
        skip=prefill(exact_normalizer=exact).skip,
        skip_decode=decode(exact_normalizer=exact).skip_decode,
    )
    plain = attention_triton(*inputs.qkv, plan=plan)
    detailed = attention_triton(*inputs.qkv, plan=plan, details=True)
    assert plain.kept is plain.tiles is plain.dropped_mass is None
    for got, wanted in zip(
        (plain.prefill, plain.decode), (detailed.prefill, detailed.decode), strict=True
    ):
        assert torch.equal(got.skipped, wanted.skipped) and torch.equal(got.visible, wanted.visible)
    torch.testing.assert_close(plain.out, detailed.out, rtol=1e-6, atol=1e-6)
    bound = detailed.dropped_mass_bound
    torch.testing.assert_close(plain.dropped_mass_bound, bound, rtol=1e-5, atol=1e-6)
    assert (bound >= detailed.dropped_mass - 1e-6).all()

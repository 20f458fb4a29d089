"""Skip-softmax of the reference, prefill and decode, against the oracle. Every test skips."""

from __future__ import annotations

import math

import pytest
import torch

from modelopt_sparse.kernels.types import NMSparsity, Phase, Plan, SkipSoftmax, SkipSoftmaxDecode
from tests.inputs import check, check_skips, features, integers, topical

TILES = [(16, 16), (64, 128), (16, 32), (128, 32), (32, 64)]
TILE_IDS = [f"{rows}x{keys}" for rows, keys in TILES]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FEATURES = [
    "", "full", "wide_window", "softcap", "sinks", "bounds", "full bounds", "mask", "tile_mask",
    "full tile_mask", "bias", "head_bias", "wide_window sinks bias", "tile_mask sinks softcap bias",
]  # fmt: skip
COUNTED = (0.001, 0.03, 0.5, 1.0)


def prefill(threshold=0.1, rows=16, keys=16, **more):
    nm = more.pop("nm", None)
    return Plan(nm=nm, skip=SkipSoftmax(threshold, rows, keys, COUNTED, **more))


def decode(threshold=0.1, keys=16, segment=64, **more):
    return Plan(
        skip_decode=SkipSoftmaxDecode(threshold, keys, segment, count_thresholds=COUNTED, **more)
    )


@pytest.mark.parametrize(("rows", "keys"), TILES, ids=TILE_IDS)
@pytest.mark.parametrize("causal", [True, False])
def test_prefill_skips_the_tiles_of_the_oracle(causal, rows, keys):
    inputs = topical([390, 65, 131, 1], [390, 300, 131, 1], span=max(rows, keys), dim=8)
    check_skips(inputs, prefill(rows=rows, keys=keys), causal=causal)


@pytest.mark.parametrize("names", FEATURES)
@pytest.mark.parametrize("exact_normalizer", [False, True], ids=["", "exact"])
def test_prefill_skips_with_every_feature(exact_normalizer, names):
    inputs = topical([75, 0, 17, 40], [75, 9, 90, 33], dim=8, strength=9.0)
    check_skips(
        inputs, prefill(exact_normalizer=exact_normalizer), **features(names, inputs, seed=1)
    )


@pytest.mark.parametrize("names", FEATURES)
@pytest.mark.parametrize("nm", [NMSparsity(2, 4, 3, 5), NMSparsity(1, 8, 0, 0)], ids=["2:4", "1:8"])
def test_nm_and_skip_compose(nm, names):
    inputs = topical([75, 17, 40], [75, 90, 40], dim=8, strength=9.0, seed=2)
    check_skips(inputs, prefill(nm=nm), **features(names, inputs, seed=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (4, 1)], ids=["3", "6kv2", "4kv1"])
@pytest.mark.parametrize("nm", [None, NMSparsity(2, 4, 0, 4)], ids=["", "2:4"])
def test_prefill_skips_in_every_dtype_and_head_layout(nm, heads, kv_heads, dtype):
    inputs = topical([50, 33], [81, 33], heads=heads, kv_heads=kv_heads, dtype=dtype, seed=4)
    check_skips(inputs, prefill(nm=nm))


@pytest.mark.parametrize("threshold", [0.0625, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("names", ["", "full", "head_bias", "tile_mask"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_tile_at_the_threshold_is_kept(dtype, names, threshold):
    inputs = integers([79, 30, 16], [79, 67, 16], dtype=dtype, heads=2, kv_heads=2)
    _, wanted = check_skips(inputs, prefill(threshold), **features(names, inputs))
    assert wanted.ties > 0, "no tie was tested"


def test_every_length_around_a_tile_skips_as_the_oracle():
    lens = list(range(34))
    inputs = topical(lens, [n + 37 for n in lens], heads=2, kv_heads=1, dim=4)
    check_skips(inputs, prefill())


def test_default_tiles_are_64_by_128_and_64_in_segments_of_4096():
    skip, skip_decode = SkipSoftmax(0.1), SkipSoftmaxDecode(0.1)
    assert (skip.block_rows, skip.block_keys) == (64, 128)
    assert (skip_decode.block_keys, skip_decode.segment_keys) == (64, 4096)
    inputs = topical([300, 1], [1000, 9001], span=128, heads=2, kv_heads=1, dim=4, dim_v=2)
    check_skips(inputs, Plan(skip=skip, skip_decode=skip_decode), ("prefill", "decode"))


LAMBDAS = {
    "scalar": torch.tensor(0.1),
    "per sequence": torch.tensor([[0.3], [0.02], [1.0]]),
    "per head": torch.tensor([0.3, 0.01, 0.0, 0.9]),
    "per both": torch.tensor([[0.3, 0.1, 0.9, 1.0], [0.02, 0.0, 0.3, 0.2], [1e-6, 0.1, 0.2, 0.3]]),
    "clamped": torch.tensor([[64.0, math.inf, -3.0, -math.inf]]),
    "nan": torch.tensor([[math.nan, -0.0, 0.3, 1.0]]),
}


@pytest.mark.parametrize("threshold", LAMBDAS.values(), ids=LAMBDAS)
@pytest.mark.parametrize("vote_heads", [None, 1], ids=["groups", "heads"])
def test_lambda_tensors_apply_per_sequence_and_head(vote_heads, threshold):
    inputs = topical([75, 40, 60], [75, 90, 60], dim=8, strength=5.0)
    check_skips(inputs, prefill(threshold))
    inputs = topical([1, 1, 1], [220, 150, 333], dim=8, strength=5.0)
    check_skips(inputs, decode(threshold, vote_heads=vote_heads), ("decode",))


def test_a_lambda_above_one_in_a_tensor_never_drops_the_largest_tile():
    inputs = integers([32, 1], [80, 200], heads=2, kv_heads=2)
    huge = torch.tensor([[2.0**20]])
    plan = Plan(skip=SkipSoftmax(huge, 16, 16), skip_decode=SkipSoftmaxDecode(huge, 16, 64))
    clamped, _ = check_skips(inputs, plan, ("prefill", "decode"))
    plan = Plan(skip=SkipSoftmax(1.0, 16, 16), skip_decode=SkipSoftmaxDecode(1.0, 16, 64))
    one, _ = check(inputs, plan)
    assert torch.equal(clamped.out, one.out)


@pytest.mark.parametrize("segment", [16, 32, 48, 64, 4096])
@pytest.mark.parametrize("vote_heads", [None, 1], ids=["groups", "heads"])
@pytest.mark.parametrize("names", ["", "full", "wide_window sinks", "tile_mask bias", "bounds"])
def test_decode_skips_the_tiles_of_the_oracle(names, vote_heads, segment):
    inputs = topical([1] * 6, [333, 64, 65, 15, 1, 200], dim=8, strength=9.0, seed=1)
    options = features(names, inputs)
    check_skips(inputs, decode(segment=segment, vote_heads=vote_heads), ("decode",), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (4, 1)], ids=["3", "6kv2", "4kv1"])
@pytest.mark.parametrize("exact_normalizer", [False, True], ids=["", "exact"])
def test_decode_skips_in_every_dtype_and_head_layout(exact_normalizer, heads, kv_heads, dtype):
    inputs = topical(
        [1] * 4, [333, 64, 90, 201], heads=heads, kv_heads=kv_heads, dtype=dtype, topics=2
    )
    check_skips(inputs, decode(exact_normalizer=exact_normalizer), ("decode",))


@pytest.mark.parametrize("threshold", [0.0625, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("segment", [16, 32, 64])
@pytest.mark.parametrize("vote_heads", [None, 1], ids=["groups", "heads"])
def test_decode_ties_are_kept(vote_heads, segment, threshold):
    inputs = integers([1] * 8, [200, 77, 130, 60, 199, 211, 150, 90])
    plan = decode(threshold, segment=segment, vote_heads=vote_heads)
    _, wanted = check_skips(inputs, plan, ("decode",))
    assert wanted.ties > 0, "no tie was tested"


@pytest.mark.parametrize("vote_heads", [None, 1], ids=["groups", "heads"])
@pytest.mark.parametrize("names", ["", "wide_window", "bounds", "tile_mask", "full"])
def test_speculative_rows_decode_when_the_caller_says_so(names, vote_heads):
    inputs = topical(
        [4, 1, 7, 2], [120, 77, 55, 200], dim=8, topics=2, strength=9.0, span=32, seed=3
    )
    plan = Plan(skip_decode=decode(vote_heads=vote_heads).skip_decode, nm=NMSparsity(1, 4, 0, 0))
    options = features(names, inputs)
    check_skips(inputs, plan, ("decode",), phase=Phase.DECODE, **options)


def test_a_lone_row_skips_by_the_prefill_rule_when_the_caller_says_so():
    inputs = topical([1, 1], [120, 77], dim=8, strength=9.0)
    check_skips(inputs, prefill(), phase=Phase.PREFILL)


@pytest.mark.parametrize("names", ["", "full", "sinks softcap", "tile_mask"])
def test_a_mixed_batch_follows_each_sequence_s_phase(names):
    inputs = topical([60, 1, 0, 33, 1], [60, 140, 9, 90, 221], dim=8, strength=9.0)
    plan = Plan(
        NMSparsity(2, 4, 0, 0),
        prefill().skip,
        decode(0.2, 32, 64, exact_normalizer=True).skip_decode,
    )
    check_skips(inputs, plan, ("prefill", "decode"), **features(names, inputs))
    for alone, phase in (
        (Plan(skip=plan.skip), "prefill"),
        (Plan(skip_decode=plan.skip_decode), "decode"),
    ):
        actual, _ = check_skips(inputs, alone, (phase,), **features(names, inputs))
        assert [tiles is None for tiles in actual.kept] == [
            (n == 1) == (phase == "prefill") for n in (60, 1, 0, 33, 1)
        ]


def test_padding_rows_have_no_vote():
    # 3 rows in a tile of 16: were the other 13 counted, with their scores of 0, nothing would go
    inputs = integers([3], [64], heads=1, kv_heads=1, gaps=False)
    inputs.q[:] = torch.tensor([1.0, 0, 0, 0])
    inputs.k[:] = 0
    inputs.k[:, 0, 0] = torch.tensor([-9.0, -12.0, -20.0, -8.0]).repeat_interleave(16)
    actual, _ = check_skips(inputs, prefill(0.5))
    assert actual.kept[0].tolist() == [[[True, False, False, True]]]


def test_a_kept_tile_is_whole():
    # row 0 finds the middle tile low, row 1 high: both take it whole
    inputs = integers([2], [48], heads=1, kv_heads=1, gaps=False)
    inputs.q[:] = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])[:, None]
    inputs.k[:] = 0
    inputs.k[:, 0, 0] = torch.tensor([0.0, -3.0, 0.0]).repeat_interleave(16)
    inputs.k[:, 0, 1] = torch.tensor([0.0, 3.0, 0.0]).repeat_interleave(16)
    actual, wanted = check(inputs, prefill(1.0), causal=False)
    assert actual.kept[0].all()
    assert wanted.dropped.max() == 0


def test_sink_logits_take_no_part_in_decisions():
    inputs = topical([75, 1], [75, 150], dim=8, strength=5.0)
    plan = Plan(skip=prefill().skip, skip_decode=decode().skip_decode)
    plain, _ = check_skips(inputs, plan, ("prefill", "decode"))
    sinks = torch.full((4,), 30.0, dtype=torch.float64)
    heavy, _ = check(inputs, plan, sinks=sinks)
    for got, wanted in zip(heavy.kept, plain.kept, strict=True):
        assert torch.equal(got, wanted)

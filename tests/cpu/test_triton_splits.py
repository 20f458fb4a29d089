"""Sequences that decode in several splits, in Triton's interpreter: against the oracle, and bit for bit."""

from __future__ import annotations

import torch

from modelopt_sparse.kernels import Phase, Plan, Seqs, SkipSoftmaxDecode, attention_triton, splits
from modelopt_sparse.kernels.splits import LONG_SPLIT_KEYS, SHORT_SPLIT_KEYS, split_keys
from tests.inputs import check, features, needs_interpreter, topical
from tests.thinned import thinned

pytestmark = needs_interpreter

# Of 512 keys: 16 keys a tile, and 32 tiles in a word of decisions.
SKIP = SkipSoftmaxDecode(0.1, 16, 64)
LENGTHS = [1, 512, 513, 0, 700]
PLANS = {
    "dense": Plan(),
    "skip": Plan(skip_decode=SKIP),
    "exact": Plan(skip_decode=SkipSoftmaxDecode(0.3, 32, 96, exact_normalizer=True)),
    "per_head": Plan(skip_decode=SkipSoftmaxDecode(0.1, 16, 512, vote_heads=1)),
    "counted": Plan(skip_decode=SkipSoftmaxDecode(0.1, 16, 64, count_thresholds=(0.5, 0.01))),
}


def test_splits_are_whole_segments_and_whole_words_of_decisions():
    assert split_keys(None) == (SHORT_SPLIT_KEYS, LONG_SPLIT_KEYS)
    assert split_keys(SKIP) == (512, 512)
    assert split_keys(SkipSoftmaxDecode(0.1)) == (4096, 4096)
    assert split_keys(SkipSoftmaxDecode(0.1, 32, 96)) == (96 * 32, 96 * 32)


def test_long_sequences_have_longer_splits(monkeypatch):
    monkeypatch.setattr(splits, "LONG", 600)
    monkeypatch.setattr(splits, "LONG_SPLIT_KEYS", 640)
    lengths = [599, 600, 1300, 40]
    inputs = topical([1] * len(lengths), lengths, kv_heads=2, dtype=torch.float32)
    check(inputs, Plan(), attention_triton)


@thinned(3, plan=PLANS, dtype=[torch.float16, torch.float32])
def test_one_row_over_several_splits(plan, dtype):
    inputs = topical([1] * len(LENGTHS), LENGTHS, kv_heads=2, strength=9.0, dtype=dtype)
    _, wanted = check(inputs, plan, attention_triton)
    if wanted.decode is not None:
        assert 0 < wanted.decode.skipped[0].sum() < wanted.decode.visible.sum()


@thinned(
    2,
    plan={"dense": PLANS["dense"], "skip": PLANS["skip"]},
    names=["full", "window", "sinks softcap", "bounds", "tile_mask bias"],
)
def test_several_rows_over_several_splits(plan, names):
    inputs = topical([3, 0, 2], [700, 40, 513], kv_heads=2, strength=9.0, dtype=torch.float32)
    check(inputs, plan, attention_triton, phase=Phase.DECODE, **features(names, inputs))


# Of exact products every tile is an edge.
@thinned(
    2,
    plan={"dense": PLANS["dense"], "skip": PLANS["skip"]},
    dtype=[torch.float32, torch.float16],
)
def test_splits_in_which_a_row_sees_no_key(plan, dtype):
    inputs = topical([2, 1], [1100, 1100], strength=9.0, dtype=dtype)
    check(inputs, plan, attention_triton, phase=Phase.DECODE, window=200)


@thinned(2, plan=PLANS)
def test_a_sequence_has_the_same_bits_alone_and_among_longer_ones(plan):
    lengths = [1100, 300, 513]
    inputs = topical([1] * 3, lengths, kv_heads=2, strength=9.0, dtype=torch.float16, gaps=False)
    together = attention_triton(*inputs.qkv, plan=plan, details=True)
    seqs = inputs.seqs
    for b, length in enumerate(lengths):
        part = slice(b, b + 1)
        own = Seqs(
            seqs.q_start[part], seqs.q_len[part], seqs.k_start[part], seqs.k_len[part], 1, length
        )
        alone = attention_triton(inputs.q, inputs.k, inputs.v, own, plan=plan, details=True)
        for name in ("out", "lse", "dropped_mass", "dropped_mass_bound"):
            theirs, ours = getattr(together, name), getattr(alone, name)
            assert (theirs is None) == (ours is None)
            assert theirs is None or torch.equal(theirs[part], ours[part]), (name, length)
        if plan.skip_decode is not None:
            assert torch.equal(together.kept[b], alone.kept[0])

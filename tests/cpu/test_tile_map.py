"""Bits of decision tiles: where they lie, that they come back, and which maps a call takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelopt_sparse.errors import ArgumentError, SparseAttentionError
from modelopt_sparse.kernels import (
    DENSE,
    Phase,
    Plan,
    Seqs,
    SkipSoftmax,
    SkipSoftmaxDecode,
    TileMap,
    attention_reference,
)
from modelopt_sparse.kernels.tiles import slot_count, word_count

SIZES = (16, 32, 64, 128)
# n_q of 1 decodes unless the caller says so; n_q > n_k has rows before position 0
Q_LENS = [70, 1, 0, 300, 129, 16, 5]
K_LENS = [70, 400, 9, 41, 300, 16, 0]
HEADS = 3


def random_kept(seqs, causal, block_rows, block_keys, phase=None, seed=0):
    """Random bits in the shapes that the contract gives, None in the other phase."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for n_q, n_k in zip(seqs.q_len.tolist(), seqs.k_len.tolist(), strict=True):
        decodes = phase is Phase.DECODE or (phase is None and n_q == 1)
        if decodes != (block_rows is None):
            kept.append(None)
            continue
        rows = range(n_q) if not causal else range(n_k - n_q, n_k)
        row_tiles = min(n_q, 1) if block_rows is None else len({p // block_rows for p in rows})
        shape = (HEADS, row_tiles, -(-n_k // block_keys))
        kept.append(torch.rand(shape, generator=generator) < 0.5)
    return kept


def packed(q_lens=Q_LENS, k_lens=K_LENS, causal=True, block_rows=16, block_keys=16, phase=None):
    seqs = Seqs.from_lengths(q_lens, k_lens)
    kept = random_kept(seqs, causal, block_rows, block_keys, phase)
    rows = sum(q_lens)
    made = TileMap.from_kept(
        kept, seqs, causal, block_rows, block_keys, rows=rows, heads=HEADS, phase=phase
    )
    return kept, made


def assert_round_trip(kept, made):
    for one, other in zip(made.unpacked(), kept, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def popcount(words):
    return sum(bin(word & 0xFFFFFFFF).count("1") for word in words.flatten().tolist())


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("block_keys", SIZES)
@pytest.mark.parametrize("block_rows", [*SIZES, None])
@pytest.mark.parametrize("phase", [None, *Phase])
def test_what_is_packed_comes_back(phase, block_rows, block_keys, causal):
    kept, made = packed(causal=causal, block_rows=block_rows, block_keys=block_keys, phase=phase)
    assert_round_trip(kept, made)
    # every other bit, of slots and of key tiles that don't exist, is 0
    assert popcount(made.words) == sum(int(x.sum()) for x in kept if x is not None)


@settings(max_examples=60, deadline=None)
@given(
    lens=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 700)), max_size=6),
    block_rows=st.sampled_from(SIZES),
    causal=st.booleans(),
    phase=st.sampled_from([None, *Phase]),
)
def test_the_slots_are_enough_for_any_lengths(lens, block_rows, causal, phase):
    q_lens, k_lens = [n for n, _ in lens], [n for _, n in lens]
    assert_round_trip(*packed(q_lens, k_lens, causal, block_rows, 64, phase))


@pytest.mark.parametrize("block_rows", SIZES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_bits_lie_where_the_layout_says(causal, block_rows):
    q_lens, k_lens, block_keys = [70, 1, 0, 300, 129], [70, 400, 9, 41, 1300], 16
    seqs = Seqs.from_lengths(q_lens, k_lens)
    per_piece, first_piece = 128 // block_rows, 0
    for b, (n_q, n_k) in enumerate(zip(q_lens, k_lens, strict=True)):
        start = n_k - n_q if causal else 0
        positions = range(start, start + n_q)
        pieces = len({p >> 7 for p in positions})
        for p in positions[:: max(1, n_q // 5)]:
            if n_q == 1:  # it decodes
                continue
            for c in {0, n_k // block_keys // 2, (n_k - 1) // block_keys}:
                kept = [
                    None if x is None else torch.zeros_like(x)
                    for x in random_kept(seqs, causal, block_rows, block_keys)
                ]
                kept[b][1, p // block_rows - start // block_rows, c] = True
                made = TileMap.from_kept(
                    kept, seqs, causal, block_rows, block_keys, rows=sum(q_lens), heads=HEADS
                )
                slot = (first_piece + (p >> 7) - (start >> 7)) * per_piece
                slot += (p & 127) // block_rows
                at = (made.words != 0).nonzero().tolist()
                assert at == [[slot, 1, c // 32]]
                assert int(made.words[tuple(at[0])]) & 0xFFFFFFFF == 1 << c % 32
        first_piece += pieces


def test_slots_and_words_follow_from_host_numbers():
    assert slot_count(300, 2, 200, 64) == min(300 // 128 + 4, 2 * 3) * 2
    assert slot_count(10_000, 2, 200, 128) == 6
    assert slot_count(0, 0, 0, 16) == 0
    assert slot_count(7, 5, 3, None) == 5
    assert [word_count(n, 16) for n in (0, 1, 512, 513)] == [0, 1, 1, 2]
    made = packed(block_rows=32, block_keys=16)[1]
    assert made.words.shape == (slot_count(sum(Q_LENS), 7, 300, 32), HEADS, 1)
    assert made.words.dtype == torch.int32


def test_no_sequences_and_no_keys_are_fine():
    for q_lens, k_lens in (([], []), ([0, 0], [0, 0]), ([5], [0])):
        for block_rows in (16, None):
            assert_round_trip(*packed(q_lens, k_lens, block_rows=block_rows))


def test_a_sequence_without_bits_keeps_none_of_its_tiles():
    seqs = Seqs.from_lengths([40, 20])
    made = TileMap.from_kept([None, None], seqs, True, 16, 16, rows=60, heads=2)
    first, second = made.unpacked()
    assert first.shape == (2, 3, 3) and second.shape == (2, 2, 2)
    assert not first.any() and not second.any()


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept[:-1],
        lambda kept: [kept[0][:2], *kept[1:]],
        lambda kept: [kept[0][:, 1:], *kept[1:]],
        lambda kept: [kept[0][..., 1:], *kept[1:]],
        lambda kept: [kept[0].int(), *kept[1:]],
        lambda kept: [kept[0], torch.ones(HEADS, 1, 25, dtype=torch.bool), *kept[2:]],
    ],
    ids=["batch", "heads", "rows", "keys", "dtype", "phase"],
)
def test_bits_that_don_t_fit_the_sequences_are_refused(change):
    seqs = Seqs.from_lengths(Q_LENS, K_LENS)
    kept = random_kept(seqs, True, 16, 16)
    with pytest.raises(ArgumentError, match="kept"):
        TileMap.from_kept(change(kept), seqs, True, 16, 16, rows=sum(Q_LENS), heads=HEADS)


Q, K = torch.ones(6, HEADS, 8), torch.ones(9, HEADS, 8)
SEQS = Seqs.from_lengths([4, 2], [5, 4])
TILES = TileMap.from_kept([None, None], SEQS, True, 16, 16, rows=6, heads=HEADS)


def refused(name, tiles, **options):
    plan = options.pop("plan", DENSE)
    with pytest.raises(SparseAttentionError) as caught:
        attention_reference(Q, K, K, SEQS, plan=replace(plan, tiles=tiles), **options)
    assert isinstance(caught.value, (ValueError, TypeError))
    assert f"plan.tiles{name}: got" in str(caught.value) and "takes" in str(caught.value)


def test_the_good_map_is_good():
    assert attention_reference(Q, K, K, SEQS, plan=Plan(tiles=TILES)).out.eq(0).all()


@pytest.mark.parametrize("tiles", [True, "all", [None, None], TILES.words], ids=type)
def test_what_is_no_map_is_refused(tiles):
    refused("", tiles)


@pytest.mark.parametrize("threshold", [0.1, torch.tensor(0.0)], ids=["float", "tensor"])
def test_given_tiles_are_not_decided_upon(threshold):
    refused("", TILES, plan=Plan(skip=SkipSoftmax(threshold)))
    refused("", TILES, plan=Plan(skip=SkipSoftmax(None, count_thresholds=(0.1,))))
    decode = SkipSoftmaxDecode(threshold)
    plan = Plan(skip=SkipSoftmax(0.0), skip_decode=decode, tiles=TILES)
    attention_reference(Q, K, K, SEQS, plan=plan)


WORDS = TILES.words


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("", {"block_rows": None}),
        *[(f".{size}", {size: bad}) for size in ("block_rows", "block_keys")
          for bad in (0, 8, 48, 256, 16.0, True, "16")],
        (".causal", {"causal": False}),
        (".phase", {"phase": Phase.PREFILL}),
        (".words", {"words": WORDS.long()}),
        (".words", {"words": WORDS.tolist()}),
        (".words", {"words": WORDS.to("meta")}),
        (".words", {"words": WORDS[:-1]}),
        (".words", {"words": WORDS[:, :1]}),
        (".words", {"words": WORDS[..., :0]}),
        (".words", {"words": WORDS[..., 0]}),
        (".words", {"block_rows": 64}),
        (".seqs", {"seqs": None}),
        (".seqs.q_len", {"seqs": Seqs.from_lengths([6], [9])}),
        (".seqs.k_len", {"seqs": replace(SEQS, k_len=SEQS.k_len[:1])}),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_maps_of_another_call_are_refused(name, changed):
    refused(name, replace(TILES, **changed))


def test_maps_of_another_kind_of_call_are_refused():
    refused(".causal", TILES, causal=False)
    refused(".phase", TILES, phase=Phase.DECODE)

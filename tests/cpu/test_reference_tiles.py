"""Given tiles, and the bound on what skipped tiles held, of the reference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import modelopt_sparse.kernels.reference.attention as reference
from modelopt_sparse.kernels import (
    NMSparsity,
    Phase,
    Plan,
    ScoreGrid,
    SkipSoftmax,
    SkipSoftmaxDecode,
    TileMap,
    attention_reference,
)
from tests.inputs import check_skips, features, topical
from tests.oracle import expand, row_positions

NAMES = ["", "full", "wide_window sinks", "softcap bias", "bounds sinks", "tile_mask sinks"]
BLOCKS = [(16, 16), (32, 64), (64, 128), (128, 32)]
BLOCK_IDS = [f"{rows}x{keys}" for rows, keys in BLOCKS]
NM = NMSparsity(2, 4, 1, 3)
# rows before position 0, no rows, no keys, one row
LENGTHS = ([90, 1, 0, 33, 21, 7], [90, 200, 9, 140, 17, 0])


def gradients(inputs, plan, options, details=False):
    """The output, and its gradients in q, k, v and, where given, sinks and bias."""
    leaves = [x.clone().requires_grad_() for x in inputs.qkv[:3]]
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = options["sinks"].clone().requires_grad_()
        leaves.append(options["sinks"])
    if "bias" in options:
        values = options["bias"].values.clone().requires_grad_()
        options["bias"] = replace(options["bias"], values=values)
        leaves.append(values)
    result = attention_reference(*leaves[:3], inputs.seqs, plan=plan, details=details, **options)
    seen = result.lse.isfinite()
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(result.out.shape, generator=generator, dtype=torch.float64)
    loss = (result.out * weight).sum() + result.lse[seen].sum()
    return result, torch.autograd.grad(loss, leaves)


def random_tiles(inputs, block_rows, block_keys, options, share=0.5):
    """A map that no decision would make: any tile may be missing, also all of a row's."""
    seqs, heads = inputs.seqs, inputs.q.shape[1]
    generator = torch.Generator().manual_seed(3)
    rows = inputs.q.shape[0]
    causal, phase = options.get("causal", True), options.get("phase")
    empty = TileMap.from_kept(
        [None] * len(seqs.q_len), seqs, causal, block_rows, block_keys,
        rows=rows, heads=heads, phase=phase,
    )  # fmt: skip
    kept = [
        None if tiles is None else torch.rand(tiles.shape, generator=generator) < share
        for tiles in empty.unpacked()
    ]
    return TileMap.from_kept(
        kept, seqs, causal, block_rows, block_keys, rows=rows, heads=heads, phase=phase
    )


def mask_of(tiles: TileMap, inputs, mask: ScoreGrid | None) -> ScoreGrid:
    """The keys of the map's tiles, and what the mask left, as one mask."""
    seqs, heads = inputs.seqs, inputs.q.shape[1]
    values = torch.ones(len(seqs.q_len), heads, seqs.max_q, seqs.max_k, dtype=torch.bool)
    for b, kept in enumerate(tiles.unpacked()):
        n_q, n_k = int(seqs.q_len[b]), int(seqs.k_len[b])
        if kept is not None:
            positions = row_positions(n_q, n_k, tiles.causal)
            keys = expand(kept.numpy(), positions, n_k, tiles, False)
            values[b, :, :n_q, :n_k] = torch.from_numpy(keys)
    if mask is not None:
        assert mask.row_start is None and mask.key_start is None
        values &= mask.values[:, :, : seqs.max_q, : seqs.max_k]
    return ScoreGrid(values)


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("nm", [None, NM], ids=["", "2:4"])
@pytest.mark.parametrize("decode", [False, True], ids=["", "decode"])
def test_the_tiles_of_a_call_repeat_it_to_the_bit(decode, nm, names):
    inputs = topical(*LENGTHS, dim=8, strength=9.0)
    options = features(names, inputs)
    skip_decode = SkipSoftmaxDecode(0.3, 16, 64) if decode else None
    plan = Plan(nm, SkipSoftmax(0.3, 16, 32), skip_decode)
    first, first_grads = gradients(inputs, plan, options, details=True)
    assert first.prefill.skipped[0].sum() > 0
    again, again_grads = gradients(inputs, Plan(nm, None, skip_decode, first.tiles), options)
    assert torch.equal(again.out, first.out)
    assert torch.equal(again.lse, first.lse)
    for name, one, other in zip(
        ["q", "k", "v", "sinks/bias"], again_grads, first_grads, strict=False
    ):
        assert torch.equal(one, other), name
    with torch.no_grad():
        plain = attention_reference(*inputs.qkv, plan=Plan(nm, tiles=first.tiles), **options)
    rows = [r for r, _ in owned(inputs) if r.stop - r.start > 1]
    assert all(torch.equal(plain.out[r], first.out[r]) for r in rows)


def owned(inputs):
    """The rows and keys of each sequence."""
    seqs = inputs.seqs
    return [
        (slice(q, q + n_q), slice(k, k + n_k))
        for q, n_q, k, n_k in zip(
            *(x.tolist() for x in (seqs.q_start, seqs.q_len, seqs.k_start, seqs.k_len)), strict=True
        )
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "keys"), BLOCKS, ids=BLOCK_IDS)
def test_a_call_is_repeated_in_every_tile_size(rows, keys, dtype):
    inputs = topical([300, 150], [300, 420], span=max(rows, keys), dim=8, dtype=dtype)
    first = attention_reference(
        *inputs.qkv, plan=Plan(skip=SkipSoftmax(0.3, rows, keys)), details=True
    )
    assert first.prefill.skipped[0].sum() > 0
    again = attention_reference(*inputs.qkv, plan=Plan(tiles=first.tiles), details=True)
    assert torch.equal(again.out, first.out)
    assert torch.equal(again.lse, first.lse)
    assert again.tiles is first.tiles


@pytest.mark.parametrize("names", ["", "full", "window"])
def test_maps_don_t_depend_on_how_many_rows_are_computed_at_once(names, monkeypatch):
    inputs = topical([300, 200], [340, 170], dim=8)
    options = features(names, inputs)
    skip, seen = SkipSoftmax(0.3, 16, 32), []
    for scores in (reference.BLOCK_SCORES, 1):
        monkeypatch.setattr(reference, "BLOCK_SCORES", scores)
        first = attention_reference(*inputs.qkv, plan=Plan(skip=skip), details=True, **options)
        again = attention_reference(*inputs.qkv, plan=Plan(tiles=first.tiles), **options)
        assert torch.equal(again.out, first.out)
        seen.append(first.tiles.words)
        assert names == "window" or first.prefill.skipped[0].sum() > 0
    assert torch.equal(*seen)


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize(("rows", "keys"), BLOCKS, ids=BLOCK_IDS)
@pytest.mark.parametrize("phase", [None, Phase.PREFILL], ids=["", "prefill"])
def test_any_map_is_attention_under_a_mask(phase, rows, keys, names):
    inputs = topical(*LENGTHS, dim=8, strength=3.0, heads=3, kv_heads=1)
    options = features(names, inputs) | {"phase": phase}
    tiles = random_tiles(inputs, rows, keys, options)
    actual, grads = gradients(inputs, Plan(tiles=tiles), options)
    masked = options | {"mask": mask_of(tiles, inputs, options.get("mask"))}
    wanted, wanted_grads = gradients(inputs, Plan(), masked)
    assert not torch.equal(wanted.out, attention_reference(*inputs.qkv, **options).out)
    torch.testing.assert_close(actual.out, wanted.out, rtol=0, atol=1e-13)
    torch.testing.assert_close(actual.lse, wanted.lse, rtol=0, atol=1e-13)
    for one, other in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_nm_chooses_before_tiles_are_left_out():
    inputs = topical([64], gaps=False, dim=8)
    whole = attention_reference(*inputs.qkv, plan=Plan(nm=NM))
    everything = random_tiles(inputs, 16, 16, {}, share=2.0)
    again = attention_reference(*inputs.qkv, plan=Plan(NM, tiles=everything))
    torch.testing.assert_close(again.out, whole.out, rtol=0, atol=1e-14)


def test_what_a_missing_tile_holds_does_not_drown_the_rest():
    inputs = topical([64], gaps=False, heads=1, kv_heads=1, dim=4, dtype=torch.float32)
    inputs.q[:], inputs.k[:] = 1.0, 0.5
    inputs.k[32:48] = 1e4  # 2 ** -1e4 is 0
    kept = torch.ones(1, 4, 4, dtype=torch.bool)
    kept[..., 2] = False
    tiles = TileMap.from_kept([kept], inputs.seqs, True, 16, 16, rows=64, heads=1)
    result = attention_reference(*inputs.qkv, plan=Plan(tiles=tiles))
    wanted = attention_reference(*inputs.qkv, mask=mask_of(tiles, inputs, None))
    assert result.lse.isfinite().all()
    torch.testing.assert_close(result.out, wanted.out)


@pytest.mark.parametrize("details", [False, True], ids=["", "details"])
def test_given_tiles_are_not_counted(details):
    inputs = topical([40, 1], [40, 90], dim=8)
    tiles = random_tiles(inputs, 16, 16, {})
    result = attention_reference(*inputs.qkv, plan=Plan(tiles=tiles), details=details)
    assert result.prefill is result.decode is result.decode_tiles is None
    assert result.dropped_mass is result.dropped_mass_bound is None
    assert result.tiles is (tiles if details else None)
    if details:
        assert torch.equal(result.kept[0], tiles.unpacked()[0]) and result.kept[1] is None


def test_sequences_that_decode_ignore_given_tiles():
    inputs = topical([40, 1], [40, 90], dim=8)
    tiles = random_tiles(inputs, 16, 16, {}, share=0.0)
    result = attention_reference(*inputs.qkv, plan=Plan(tiles=tiles))
    dense = attention_reference(*inputs.qkv)
    prefill, decode = (rows for rows, _ in owned(inputs))
    assert torch.equal(result.out[decode], dense.out[decode])
    assert (result.out[prefill] == 0).all() and (result.lse[prefill] == -math.inf).all()


def test_maps_are_returned_with_details_for_the_phases_that_skip():
    inputs = topical([40, 1], [40, 90], dim=8)
    skip, skip_decode = SkipSoftmax(0.3, 16, 32), SkipSoftmaxDecode(0.3, 16, 64)
    for plan, has in (
        (Plan(), (False, False)),
        (Plan(skip=skip), (True, False)),
        (Plan(skip_decode=skip_decode), (False, True)),
        (Plan(skip=skip, skip_decode=skip_decode), (True, True)),
    ):
        result = attention_reference(*inputs.qkv, plan=plan, details=True)
        assert (result.tiles is not None, result.decode_tiles is not None) == has
        assert (result.kept is not None) == any(has)
        if has[0]:
            assert (result.tiles.block_rows, result.tiles.block_keys) == (16, 32)
        if has[1]:
            assert (result.decode_tiles.block_rows, result.decode_tiles.block_keys) == (None, 16)
            assert len(result.decode_tiles.words) == 2
        without = attention_reference(*inputs.qkv, plan=plan)
        assert without.tiles is without.decode_tiles is without.kept is None
        assert (without.dropped_mass_bound is not None) == any(has)


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("exact", [False, True], ids=["", "exact"])
@pytest.mark.parametrize("nm", [None, NM], ids=["", "2:4"])
def test_the_bound_is_above_the_dropped_mass_and_zero_where_nothing_was_dropped(nm, exact, names):
    q_lens, k_lens = LENGTHS
    inputs = topical([*q_lens, 1, 1, 1], [*k_lens, 90, 333, 201], dim=8, strength=9.0)
    plan = Plan(
        nm,
        SkipSoftmax(0.3, 16, 16, exact_normalizer=exact),
        SkipSoftmaxDecode(0.3, 16, 64, exact_normalizer=exact),
    )
    options = features(names, inputs)
    # that it is the formula's is part of every comparison with the oracle
    result, _ = check_skips(inputs, plan, ("prefill", "decode"), **options)
    bound, dropped = result.dropped_mass_bound, result.dropped_mass
    assert bound.dtype == result.lse.dtype and bound.shape == result.lse.shape
    assert (bound >= dropped - 1e-15).all() and (bound <= 1).all()
    assert ((bound == 0) == (dropped == 0)).all()
    assert (bound > dropped).any()
    plain = attention_reference(*inputs.qkv, plan=plan, **options)
    assert torch.equal(plain.dropped_mass_bound, bound)


def test_the_bound_is_met_by_tiles_of_equal_scores():
    inputs = topical([1], [64], gaps=False, heads=1, kv_heads=1, dim=4)
    inputs.q[:], inputs.k[:] = 1.0, 0.0
    inputs.k[:, 0, 0] = torch.tensor([0.0, -8.0, -9.0, 0.0]).repeat_interleave(16)
    plan = Plan(skip_decode=SkipSoftmaxDecode(0.1, 16, 64))
    result = attention_reference(*inputs.qkv, plan=plan, scale=math.log(2), details=True)
    lost = 16 * (2**-8 + 2**-9)
    wanted = torch.full((1, 1), lost / (32 + lost), dtype=torch.float64)
    torch.testing.assert_close(result.dropped_mass, wanted)
    torch.testing.assert_close(result.dropped_mass_bound, wanted)


def test_counting_alone_drops_nothing():
    inputs = topical([40, 1], [40, 90], dim=8)
    plan = Plan(skip=SkipSoftmax(None, 16, 16, (0.5,)))
    result = attention_reference(*inputs.qkv, plan=plan)
    assert (result.dropped_mass_bound == 0).all()


def test_natural_lse_is_that_of_a_plain_softmax():
    inputs = topical([5], [9], gaps=False, heads=2, kv_heads=2, dim=8)
    result = attention_reference(*inputs.qkv, causal=False)
    scores = torch.einsum("ihd,jhd->ihj", inputs.q, inputs.k) * 8**-0.5
    torch.testing.assert_close(result.natural_lse, scores.logsumexp(-1))
    nothing = topical([3], [0], gaps=False)
    assert (attention_reference(*nothing.qkv).natural_lse == -math.inf).all()

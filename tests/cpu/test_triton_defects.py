"""Inputs on which a defect in a corner of the Triton kernels would show; each was put in once, and seen."""

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
from tests.cpu.test_triton_gradients import check_gradients, small
from tests.cpu.test_triton_tiles import assert_same, random_map, reference
from tests.inputs import EXACT_SCALE, check, integers, needs_interpreter, topical

pytestmark = needs_interpreter

# Sink tokens and windows whose last shielded key is the first or the last of a launch tile.
AT_A_TILE = pytest.mark.parametrize(("sinks", "window"), [(0, 2), (65, 0)], ids=str)


def levels(tiles: list[float], n_q: int):
    """Rows whose log2 scores, at EXACT_SCALE, are the same for all 16 keys of a tile."""
    inputs = integers(
        [n_q], [16 * len(tiles)], heads=1, kv_heads=1, dtype=torch.float32, gaps=False
    )
    inputs.q[:] = torch.tensor([1.0, 0, 0, 0])
    inputs.k[:] = 0
    inputs.k[:, 0, 0] = torch.tensor(tiles).repeat_interleave(16)
    return inputs


@pytest.mark.parametrize("phase", Phase)
def test_a_score_that_is_not_a_number_keeps_its_tile(phase):
    inputs = levels([-9.0, -12.0, -20.0, -8.0], 3)
    inputs.k[16:32] = math.nan  # a tile that would be skipped
    plan = Plan(skip=SkipSoftmax(0.5, 16, 16), skip_decode=SkipSoftmaxDecode(0.5, 16, 64))
    found = attention_triton(*inputs.qkv, plan=plan, phase=phase, scale=EXACT_SCALE, details=True)
    assert found.kept[0][0, 0].tolist()[1:] == [True, False, True]
    assert found.out.isnan().all()


def test_one_score_among_numbers_that_is_none_keeps_its_tile_in_decode():
    inputs = levels([0.0, -9.0, 0.0, -9.0, 0.0], 1)
    inputs.k[40] = math.nan
    plan = Plan(skip_decode=SkipSoftmaxDecode(0.5, 16, 128))
    found = attention_triton(*inputs.qkv, plan=plan, scale=EXACT_SCALE, details=True)
    # What follows it, downward, can't be compared with its maximum.
    assert found.kept[0][0, 0].tolist() == [True, True, True, False, True]
    assert found.out.isnan().all()


@AT_A_TILE
def test_keys_are_shielded_up_to_the_end_of_a_launch_tile(sinks, window):
    inputs = integers([130], [130], heads=1, kv_heads=1, dtype=torch.float16)
    check(inputs, Plan(NMSparsity(1, 4, sinks, window)), attention_triton)


def at_a_block():
    """A row that begins a row block, and has most of its weight on a group's last key if that is shielded."""
    inputs = small(q_lens=[256], k_lens=[256], heads=1, gaps=False)
    inputs.k[124:128] = inputs.k[124]
    inputs.q[128] = inputs.k[124]
    return inputs


@AT_A_TILE
@pytest.mark.parametrize("given", [False, True], ids=["", "given"])
def test_gradients_where_shields_end_with_a_launch_tile(given, sinks, window):
    inputs = at_a_block()
    sinks = min(sinks, 33) if given else sinks
    tiles = random_map(inputs, 16, 16, share=0.8) if given else None
    check_gradients(inputs, Plan(NMSparsity(1, 4, sinks, window), tiles=tiles))


@pytest.mark.parametrize(("window", "row", "key"), [(2, 128, 127), (191, 191, 0)], ids=str)
def test_gradients_where_windows_end_with_a_launch_tile(window, row, key):
    """The last row that sees a key, or the first that does not, has all its weight on it, if it sees it."""
    inputs = small(q_lens=[200], k_lens=[200], heads=1, gaps=False)
    inputs.k[key] *= 2
    inputs.q[row] = inputs.k[key]
    check_gradients(inputs, Plan(), window=window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_decisions_in_prefill_fill_many_words(dtype):
    inputs = topical([40], [1100], heads=1, kv_heads=1, strength=9.0, dtype=dtype)
    _, wanted = check(inputs, Plan(skip=SkipSoftmax(0.1, 16, 16)), attention_triton)
    assert 0 < wanted.prefill.skipped[0].sum() < wanted.prefill.visible.sum()


@pytest.mark.parametrize("window", [45, 120])
def test_given_tiles_under_a_window_have_edges_on_both_sides(window):
    inputs = topical([200], [200], heads=1, kv_heads=1, strength=9.0, dtype=torch.float16)
    plan = Plan(tiles=random_map(inputs, 16, 16, share=0.8))
    actual = attention_triton(*inputs.qkv, plan=plan, window=window)
    assert_same(actual, reference(inputs, plan, {"window": window}), inputs, {})


def test_given_tiles_that_no_row_sees_are_left_out_where_all_that_is_seen_is_shielded():
    inputs = topical([140], [300], heads=2, kv_heads=1, strength=9.0, dtype=torch.float16)
    plan = Plan(NMSparsity(2, 4, 0, 200), tiles=random_map(inputs, 16, 16, share=0.8))
    actual = attention_triton(*inputs.qkv, plan=plan, window=60)
    assert_same(actual, reference(inputs, plan, {"window": 60}), inputs, {})
    check_gradients(inputs, plan, window=60)


@pytest.mark.parametrize("phase", Phase)
def test_a_sink_above_all_scores_scales_what_skipped_tiles_add(phase):
    inputs = levels([0.0, -2.0, -2.0, 0.0], 3)
    plan = Plan(
        skip=SkipSoftmax(0.5, 16, 16, exact_normalizer=True),
        skip_decode=SkipSoftmaxDecode(0.5, 16, 64, exact_normalizer=True),
    )
    sinks = torch.tensor([3 * EXACT_SCALE])  # log2: 3 above the largest score
    actual, _ = check(inputs, plan, attention_triton, sinks=sinks, phase=phase)
    assert actual.kept[0].tolist() == [[[True, False, False, True]]]


@pytest.mark.parametrize("names", ["", "full"])
def test_skipped_tiles_have_no_gradient_among_full_blocks(names):
    inputs = topical([300], [300], heads=2, kv_heads=1, strength=9.0, topics=2, dtype=torch.float16)
    check_gradients(inputs, Plan(skip=SkipSoftmax(0.5, 64, 64)), causal=names != "full")

"""Given tiles in the Triton kernels, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modelopt_sparse.kernels import (
    NMSparsity,
    Phase,
    Plan,
    SkipSoftmax,
    TileMap,
    attention_reference,
    attention_triton,
)
from tests.inputs import Tolerance, assert_close, features, needs_interpreter, topical
from tests.oracle import as_array

pytestmark = needs_interpreter

BLOCKS = [(16, 16), (64, 128), (128, 32)]
BLOCK_IDS = [f"{rows}x{keys}" for rows, keys in BLOCKS]
NM = NMSparsity(2, 4, 1, 3)
LENGTHS = ([40, 1, 0, 21, 7], [40, 90, 9, 17, 0])


def small(lengths=LENGTHS, **more):
    return topical(
        *lengths, **{"heads": 2, "kv_heads": 1, "dtype": torch.float32, "strength": 9.0} | more
    )


def random_map(inputs, rows, keys, causal=True, phase=None, share=0.5) -> TileMap:
    """A map that no decision would make: any tile may be missing, also all of a row's."""
    empty = TileMap.from_kept(
        [None] * len(inputs.seqs.q_len), inputs.seqs, causal, rows, keys,
        rows=inputs.q.shape[0], heads=inputs.q.shape[1], phase=phase,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    kept = [
        None if tiles is None else torch.rand(tiles.shape, generator=generator) < share
        for tiles in empty.unpacked()
    ]
    return TileMap.from_kept(
        kept, inputs.seqs, causal, rows, keys,
        rows=inputs.q.shape[0], heads=inputs.q.shape[1], phase=phase,
    )  # fmt: skip


def assert_same(actual, wanted, inputs, options) -> None:
    """out and lse are those of the reference, computed in float64."""
    bound = Tolerance.of(inputs, options.get("scale"), options.get("bias"), rounds_weights=True)
    wanted_out = as_array(wanted.out)
    limit = bound.value * (2 * bound.weight + bound.product) + bound.out_unit * abs(wanted_out)
    assert_close(as_array(actual.out), wanted_out, limit, "out")
    lse = as_array(wanted.lse)
    limit = (4 * bound.weight + bound.lse_unit * abs(lse).clip(0, 1e9)).clip(0, 1)
    assert_close(as_array(actual.lse), lse, limit, "lse")


def reference(inputs, plan, options):
    """The reference on the same numbers, in float64."""
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = options["sinks"].double()
    q, k, v = (x.double() for x in inputs.qkv[:3])
    return attention_reference(q, k, v, inputs.seqs, plan=plan, **options)


@pytest.mark.parametrize("names", ["", "full", "wide_window sinks", "bounds", "tile_mask bias"])
@pytest.mark.parametrize(("rows", "keys"), BLOCKS, ids=BLOCK_IDS)
def test_any_map_is_what_the_reference_makes_of_it(rows, keys, names):
    inputs = small(dtype=torch.float16 if names else torch.float32)
    options = features(names, inputs)
    tiles = random_map(inputs, rows, keys, options.get("causal", True))
    plan = Plan(tiles=tiles)
    actual = attention_triton(*inputs.qkv, plan=plan, details=True, **options)
    assert actual.tiles is tiles and actual.prefill is actual.dropped_mass is None
    assert_same(actual, reference(inputs, plan, options), inputs, options)


@pytest.mark.parametrize("phase", Phase)
def test_the_map_is_of_sequences_that_prefill(phase):
    inputs = small(([4, 1], [60, 90]))
    plan = Plan(tiles=random_map(inputs, 16, 16, phase=phase))
    actual = attention_triton(*inputs.qkv, plan=plan, phase=phase)
    assert_same(actual, reference(inputs, plan, {"phase": phase}), inputs, {})
    dense = attention_triton(*inputs.qkv, phase=phase)
    assert torch.allclose(actual.out, dense.out, equal_nan=True) == (phase is Phase.DECODE)


def test_nm_chooses_before_tiles_are_left_out():
    inputs = small()
    plan = Plan(NM, tiles=random_map(inputs, 16, 32))
    assert_same(attention_triton(*inputs.qkv, plan=plan), reference(inputs, plan, {}), inputs, {})


@pytest.mark.parametrize("nm", [None, NM], ids=["", "2:4"])
def test_the_tiles_of_a_call_repeat_it(nm):
    inputs = small(([30, 20], [75, 61]))
    plan = Plan(nm, SkipSoftmax(0.3, 16, 16))
    first = attention_triton(*inputs.qkv, plan=plan, details=True)
    theirs = attention_reference(*inputs.qkv, plan=plan, details=True)
    assert first.prefill.skipped[0].sum() > 0
    assert torch.equal(first.tiles.words, theirs.tiles.words)
    again = attention_triton(*inputs.qkv, plan=Plan(nm, tiles=theirs.tiles))
    torch.testing.assert_close(again.out, first.out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.lse, first.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", ["", "window", "bounds", "tile_mask"])
def test_bits_of_invisible_tiles_do_not_matter(names):
    inputs = small(([30, 1, 9], [75, 61, 40]))
    options = features(names, inputs)
    plan = Plan(skip=SkipSoftmax(0.9, 16, 16))
    kept = attention_reference(*inputs.qkv, plan=plan, details=True, **options).tiles
    counted = Plan(skip=SkipSoftmax(1e-30, 16, 16))
    visible = attention_reference(*inputs.qkv, plan=counted, details=True, **options).tiles
    assert (~visible.words & 0xF).any()
    noise = torch.randint(-(2**31), 2**31, kept.words.shape, generator=torch.Generator()).int()
    noisy = replace(kept, words=kept.words | (noise & ~visible.words))
    assert not torch.equal(noisy.words, kept.words)
    calls = [
        attention_triton(*inputs.qkv, plan=Plan(tiles=tiles), **options) for tiles in (kept, noisy)
    ]
    assert torch.equal(calls[0].out, calls[1].out) and torch.equal(calls[0].lse, calls[1].lse)

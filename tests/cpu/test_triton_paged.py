"""Keys and values in pages, in Triton's interpreter: the bits are those of packed ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modelopt_sparse.kernels import (
    NMSparsity,
    Phase,
    Plan,
    SkipSoftmax,
    SkipSoftmaxDecode,
    attention_paged,
    attention_reference,
    attention_triton,
)
from tests.inputs import features, needs_interpreter, topical
from tests.paged import LAYOUTS, in_pages, paged_triton
from tests.thinned import thinned

SKIP = SkipSoftmax(0.1, 16, 32)
DECODE = SkipSoftmaxDecode(0.1, 32, 64)
PLANS = {
    "dense": Plan(),
    "2:4": Plan(NMSparsity(2, 4)),
    "skip": Plan(skip=SKIP, skip_decode=DECODE),
    "2:4+skip": Plan(NMSparsity(2, 4), SKIP, DECODE),
}
PAGE_SIZES = [1, 7, 16, 32, 64, 128]


def assert_same_bits(found, wanted) -> None:
    for name in ("out", "lse", "dropped_mass", "dropped_mass_bound"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs), name
    assert (found.kept is None) == (wanted.kept is None)
    for ours, theirs in zip(found.kept or (), wanted.kept or (), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def mixed(dtype=torch.float16, **more):
    """Prefill, a chunk, a row that decodes, and nothing."""
    return topical([70, 20, 1, 0, 1], [70, 150, 90, 0, 33], strength=9.0, dtype=dtype, **more)


def compare(inputs, plan, page_size, layout, **options) -> None:
    packed = attention_triton(*inputs.qkv, plan=plan, details=True, **options)
    cache = in_pages(inputs.k, inputs.v, inputs.seqs, page_size, layout)
    found = paged_triton(inputs.q, cache, inputs.seqs, plan=plan, details=True, **options)
    assert_same_bits(found, packed)
    if plan.skip is not None and not options:
        assert 0 < found.prefill.skipped[0].sum() < found.prefill.visible.sum()
        assert 0 < found.decode.skipped[0].sum() < found.decode.visible.sum()


@needs_interpreter
@thinned(6, plan=PLANS, page_size=PAGE_SIZES)
def test_pages_of_any_size_give_the_bits_of_packed_keys(plan, page_size):
    compare(mixed(), plan, page_size, "nhd")


@needs_interpreter
@thinned(4, layout=LAYOUTS, dtype=[torch.float16, torch.float32])
def test_pages_of_any_layout_give_the_bits_of_packed_keys(layout, dtype):
    compare(mixed(dtype, dim_v=16), PLANS["skip"], 32, layout)


@needs_interpreter
@thinned(
    3,
    phase=[None, Phase.DECODE],
    names=["full", "window", "sinks softcap", "bounds", "tile_mask bias"],
)
def test_pages_with_other_options(phase, names):
    inputs = mixed() if phase is None else topical([3, 2], [140, 50], dtype=torch.float16)
    compare(inputs, PLANS["skip"], 16, "hnd", phase=phase, **features(names, inputs))


@needs_interpreter
def test_a_cache_that_begins_with_keys_of_others_is_not_read_from_its_start():
    """What packed keys start at means nothing in pages."""
    inputs = mixed()
    seqs = replace(inputs.seqs, k_start=inputs.seqs.k_start + 1000)
    cache = in_pages(inputs.k, inputs.v, inputs.seqs, 16)
    found = paged_triton(inputs.q, cache, seqs)
    assert torch.equal(found.out, attention_triton(*inputs.qkv).out)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", [1, 7, 64])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_reference_reads_pages(plan, page_size, layout):
    inputs = mixed(torch.float32)
    cache = in_pages(inputs.k, inputs.v, inputs.seqs, page_size, layout)
    found = attention_paged(inputs.q, cache, inputs.seqs, plan=plan, details=True)
    assert_same_bits(found, attention_reference(*inputs.qkv, plan=plan, details=True))

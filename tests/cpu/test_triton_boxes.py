"""Keys that come by tensor descriptors, in Triton's interpreter: the same bits as by pointers."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from modelopt_sparse.kernels import Plan, SkipSoftmax, SkipSoftmaxDecode, attention_triton
from modelopt_sparse.kernels import boxes as module
from tests.inputs import needs_interpreter, topical
from tests.paged import LAYOUTS, in_pages, paged_triton

pytestmark = needs_interpreter

PLANS = {
    "dense": Plan(),
    "skip": Plan(skip=SkipSoftmax(0.1, 16, 32), skip_decode=SkipSoftmaxDecode(0.1, 32, 64)),
}
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


@pytest.fixture
def made(monkeypatch):
    """From now on descriptors are made; how many tiles' rows each had."""
    rows = []
    make = module._box

    def counted(x, layout, block):
        rows.append(block)
        return make(x, layout, block)

    monkeypatch.setattr(module, "_has_copy_engine", lambda device: True)
    monkeypatch.setattr(module, "_box", counted)
    return rows


def inputs(dim: int = 32):
    """q, k, v and sequences, whose values are of a power of two."""
    lengths = [70, 1, 33], [200, 140, 33]
    found = topical(*lengths, kv_heads=2, dim=dim, strength=9.0, dtype=torch.float16, gaps=False)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(len(found.k), 2, 32, generator=generator).half()
    return found.q, found.k, v, found.seqs


def assert_same(found, wanted, bound: float = 0.0):
    torch.testing.assert_close(found.out, wanted.out, rtol=0, atol=bound)
    assert torch.equal(found.lse, wanted.lse)
    if wanted.prefill is not None:
        assert 0 < wanted.prefill.skipped.sum() < wanted.prefill.visible.sum()
        assert torch.equal(found.prefill.skipped, wanted.prefill.skipped)
        assert torch.equal(found.decode.skipped, wanted.decode.skipped)


@each_plan
@pytest.mark.parametrize("dim", [32, 48], ids=["one_part", "two_parts"])
def test_packed_keys(plan, dim, request):
    """Where sequences decode, keys of 48 channels are 32 and 16."""
    given = inputs(dim)
    wanted = attention_triton(*given, plan=plan)
    made = request.getfixturevalue("made")
    assert_same(attention_triton(*given, plan=plan), wanted)
    assert made


@pytest.mark.parametrize(
    ("plan", "page", "layout"),
    [
        *(
            pytest.param(PLANS["skip"], *x, id=f"skip-{x}", marks=[pytest.mark.slow] * (index % 3))
            for index, x in enumerate(product((16, 32, 64), LAYOUTS))
        ),
        pytest.param(PLANS["dense"], 64, "nhd", id="dense-64"),
    ],
)
def test_pages_of_whole_and_half_tiles(plan, page, layout, request):
    q, k, v, seqs = inputs()
    cache = in_pages(k, v, seqs, page, layout)
    wanted = paged_triton(q, cache, seqs, plan)
    made = request.getfixturevalue("made")
    # Of half tiles the values are added up in another order. (Dense tiles have 128 keys.)
    is_half = 2 * page == (128 if plan is PLANS["dense"] else 32)
    assert_same(paged_triton(q, cache, seqs, plan), wanted, 1e-3 if is_half else 0.0)
    if plan is PLANS["skip"]:
        # Tiles have 32 keys; sequences that decode take whole ones only.
        assert set(made) == {min(page, 32)}

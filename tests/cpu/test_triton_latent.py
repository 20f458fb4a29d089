"""Multi-head latent attention over a paged cache of latents, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modelopt_sparse.kernels import (
    PagedKV,
    Phase,
    Plan,
    SkipSoftmaxDecode,
    attention_paged,
    attention_reference,
)
from modelopt_sparse.kernels.check import Call
from modelopt_sparse.kernels.latent import has_values_in_keys
from modelopt_sparse.kernels.launch import split_dim
from tests.inputs import needs_interpreter, topical
from tests.paged import in_pages, paged_triton

PLANS = {
    "dense": Plan(),
    "skip": Plan(skip_decode=SkipSoftmaxDecode(0.2, 16, 64, vote_heads=2)),
    "exact": Plan(skip_decode=SkipSoftmaxDecode(0.2, 16, 64, vote_heads=2, exact_normalizer=True)),
}


def latents(dims, q_lens, k_lens, page_size, dtype=torch.float32, heads=4):
    """Packed inputs whose values are the first channels of the keys, and a cache that holds them once."""
    inputs = topical(
        q_lens, k_lens, heads=heads, kv_heads=1, dim=sum(dims), strength=9.0, dtype=dtype
    )
    pages = in_pages(inputs.k, inputs.k, inputs.seqs, page_size)
    cache = PagedKV.from_latent(pages.k.squeeze(2), dims[0], pages.block_table)
    return replace(inputs, v=inputs.k[..., : dims[0]]), cache


@pytest.mark.parametrize(
    ("dim", "parts"),
    {576: (512, 64), 320: (256, 64), 192: (128, 64), 80: (64, 16), 128: (128, 0), 48: (32, 16),
     112: (128, 0), 16: (16, 0), 24: (32, 0), 96: (64, 32)}.items(),
)  # fmt: skip
def test_a_head_dim_is_one_power_of_two_or_two(dim, parts):
    assert split_dim(dim) == parts


def test_latents_are_known_by_where_they_lie():
    inputs, cache = latents((32, 16), [1], [40], 16)
    call = Call(inputs.q, cache.k, cache.v, inputs.seqs, Plan(), block_tables=cache.block_tables)
    assert has_values_in_keys(call)
    apart = call._replace(v=cache.v.clone())
    tables = call._replace(block_tables=(cache.block_table, cache.block_table.clone()))
    others = call._replace(v=cache.k[..., :16])
    assert not any(map(has_values_in_keys, (apart, tables, others)))


@needs_interpreter
@pytest.mark.parametrize("names", ["", "window", "sinks bounds"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_latents_give_what_packed_keys_and_values_give(plan, names):
    inputs, cache = latents((32, 16), [2, 1, 0, 1], [600, 70, 9, 33], 16)
    options = {"phase": Phase.DECODE, "scale": 0.2, "details": True, "plan": plan}
    if names == "window":
        options["window"] = 150
    elif names:
        options["sinks"] = torch.tensor([0.5, -1.0, 2.0, 0.0])
        rows = inputs.q.shape[0]
        options["bounds"] = torch.tensor([[20, 550], [100, 101], *[[0, 60]] * (rows - 2)]).int()
    found = paged_triton(inputs.q, cache, inputs.seqs, **options)
    wanted = attention_reference(*inputs.qkv, **options)
    torch.testing.assert_close(found.out, wanted.out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.lse, wanted.lse, rtol=1e-5, atol=1e-5)
    if plan.skip_decode is not None:
        assert all(map(torch.equal, found.kept, wanted.kept))
        assert 0 < found.decode.skipped[0].sum() < found.decode.visible.sum()


@needs_interpreter
def test_latents_that_no_row_sees_may_hold_anything():
    inputs, cache = latents((32, 16), [2], [64], 16)
    options = {"phase": Phase.DECODE, "scale": 0.2}
    options["bounds"] = torch.tensor([[0, 20], [40, 64]]).int().repeat(len(inputs.q), 1)
    options["bounds"] = options["bounds"][: len(inputs.q)]
    wanted = paged_triton(inputs.q, cache, inputs.seqs, **options).out
    page, slot = cache.block_table[0, 30 // 16], 30 % 16
    cache.k[page, slot] = torch.nan
    found = paged_triton(inputs.q, cache, inputs.seqs, **options).out
    assert torch.equal(found, wanted) and found.isfinite().all()


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_latents_of_deepseek(dtype):
    inputs, cache = latents((512, 64), [2, 1], [150, 70], 64, dtype, heads=16)
    options = {"phase": Phase.DECODE, "scale": 192**-0.5}
    found = paged_triton(inputs.q, cache, inputs.seqs, **options)
    wide = [x.double() for x in (inputs.q, inputs.k, inputs.v)]
    wanted = attention_reference(*wide, inputs.seqs, **options)
    error = (found.out.double() - wanted.out).norm() / wanted.out.norm()
    assert error < {torch.float16: 1e-3, torch.float32: 1e-6}[dtype]


def test_the_reference_reads_latents():
    inputs, cache = latents((32, 16), [2, 1], [60, 33], 16)
    options = {"phase": Phase.DECODE, "scale": 0.2}
    found = attention_paged(inputs.q, cache, inputs.seqs, **options)
    assert torch.equal(found.out, attention_reference(*inputs.qkv, **options).out)

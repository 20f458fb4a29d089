"""Keys and values in 8 bits, in Triton's interpreter: what the same numbers give in full."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modelopt_sparse import ArgumentError, UnsupportedCall
from modelopt_sparse.kernels import (
    NMSparsity,
    PagedKV,
    Phase,
    Plan,
    SkipSoftmax,
    SkipSoftmaxDecode,
    attention_paged,
    attention_reference,
    attention_varlen,
    ops,
)
from tests.inputs import needs_interpreter, topical
from tests.paged import in_pages
from tests.thinned import thinned

FP8 = torch.float8_e4m3fn
SHAPE = [70, 20, 1, 0], [70, 150, 90, 9]
SPLITS = [1, 1], [700, 30]
PLANS = {
    "dense": Plan(),
    "2:4+skip": Plan(NMSparsity(2, 4), SkipSoftmax(0.1, 16, 32), SkipSoftmaxDecode(0.1, 32, 64)),
}


def quantized(k_scale: float, v_scale: float, dtype=torch.float16, shape=SHAPE):
    """Inputs whose keys and values are 8-bit numbers times scales, and the cache that holds these numbers."""
    inputs = topical(*shape, strength=9.0, dtype=dtype)
    k, v = (x.float().nan_to_num(0.0) for x in (inputs.k, inputs.v))
    k8, v8 = (k / k_scale).to(FP8), (v / v_scale).to(FP8)
    # Pages are filled by index, which 8-bit tensors don't offer.
    pages = in_pages(k8.float(), v8.float(), inputs.seqs, 16)
    cache = replace(pages, k=pages.k.to(FP8), v=pages.v.to(FP8), k_scale=k_scale, v_scale=v_scale)
    wide = (inputs.q.double(), k8.double() * k_scale, v8.double() * v_scale)
    return inputs, cache, wide


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_reference_reads_8_bits(plan):
    inputs, cache, wide = quantized(0.5, 0.03, torch.float32)
    found = attention_paged(inputs.q, cache, inputs.seqs, plan=plan, details=True)
    wanted = attention_reference(*wide, inputs.seqs, plan=plan, details=True)
    torch.testing.assert_close(found.out.double(), wanted.out, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, found.kept or (), wanted.kept or ()))


@needs_interpreter
@thinned(2, plan=PLANS, dtype=[torch.float16, torch.float32], shape={"": SHAPE, "splits": SPLITS})
def test_the_kernels_read_8_bits(plan, dtype, shape, monkeypatch):
    inputs, cache, wide = quantized(0.5, 0.03, dtype, shape)
    monkeypatch.setattr("modelopt_sparse.kernels.api.run", ops.run)
    found = attention_paged(inputs.q, cache, inputs.seqs, plan=plan, details=True)
    wanted = attention_reference(*wide, inputs.seqs, plan=plan, details=True)
    error = (found.out.double() - wanted.out).norm() / wanted.out.norm()
    assert error < {torch.float16: 1e-3, torch.float32: 1e-6}[dtype]
    torch.testing.assert_close(found.lse.double(), wanted.lse, rtol=1e-4, atol=1e-4)
    assert all(map(torch.equal, found.kept or (), wanted.kept or ()))


@needs_interpreter
def test_latents_in_8_bits(monkeypatch):
    inputs, cache, wide = quantized(0.5, 0.5)
    latents = PagedKV.from_latent(cache.k[:, :, 0], 8, cache.block_table, 0.5)
    seqs = replace(inputs.seqs, q_len=inputs.seqs.q_len.clamp(max=2), max_q=2, min_q=1)
    monkeypatch.setattr("modelopt_sparse.kernels.api.run", ops.run)
    options = {"phase": Phase.DECODE, "scale": 0.3}
    found = attention_paged(inputs.q, latents, seqs, **options)
    keys = wide[1][:, :1]
    wanted = attention_reference(wide[0], keys, keys[..., :8], seqs, **options)
    error = (found.out.double() - wanted.out).norm() / wanted.out.norm()
    assert error < 1e-3


def test_8_bits_are_refused_where_the_gpu_has_none(monkeypatch):
    inputs, cache, _ = quantized(1.0, 1.0)
    monkeypatch.setattr("modelopt_sparse.kernels.api.run", ops.run)
    monkeypatch.setattr(ops, "_has_fp8", lambda device: False)
    with pytest.raises(UnsupportedCall, match=r"k: got torch.float8_e4m3fn on cpu; takes a GPU of"):
        attention_paged(inputs.q, cache, inputs.seqs)


def test_8_bits_are_taken_in_pages_alone_and_of_both():
    inputs, cache, _ = quantized(1.0, 1.0)
    with pytest.raises(ArgumentError, match=r"v: got torch\.float16; takes torch\.float8_e4m3fn"):
        attention_paged(inputs.q, replace(cache, v=cache.v.half()), inputs.seqs)
    with pytest.raises(ArgumentError, match=r"k: got torch\.float8_e4m3fn; takes"):
        attention_varlen(inputs.q, inputs.k.to(FP8), inputs.v.to(FP8), inputs.seqs)
    with pytest.raises(ArgumentError, match=r"cache\.k_scale: got nan"):
        attention_paged(inputs.q, replace(cache, k_scale=float("nan")), inputs.seqs)

"""The same call on a GPU as on the CPU: kept tiles equal, outputs close, models sparse end to end."""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import modelopt_sparse as mtsa
from modelopt_sparse.kernels import (
    AttentionOutput,
    NMSparsity,
    Plan,
    Seqs,
    SkipSoftmax,
    SkipSoftmaxDecode,
    attention_varlen,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MODEL = Path(__file__).resolve().parents[2] / "examples/tiny_lm/model"
PLANS = {
    "dense": Plan(),
    "nm": Plan(nm=NMSparsity(2, 4, num_sink_tokens=3, dense_window_size=16)),
    "skip": Plan(skip=SkipSoftmax(0.25, 16, 32), skip_decode=SkipSoftmaxDecode(0.25, 32, 128)),
    "both": Plan(nm=NMSparsity(4, 8), skip=SkipSoftmax(0.5, 16, 16, exact_normalizer=True)),
}


def topical(lengths: list[int], heads: int, dim: int, seed: int) -> torch.Tensor:
    """Integer-valued vectors that follow a topic changing every 40 tokens: scores are exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randint(-2, 3, (8, heads, dim), generator=torch.Generator().manual_seed(1))
    rows = []
    for length in lengths:
        noise = torch.randint(-1, 2, (length, heads, dim), generator=generator)
        rows.append(topics[torch.arange(length) // 40 % 8] + noise)
    return torch.cat(rows).float()


def on_cuda(seqs: Seqs) -> Seqs:
    values = {field.name: getattr(seqs, field.name) for field in fields(seqs)}
    return Seqs(**{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in values.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_call_on_the_gpu_keeps_the_tiles_that_the_cpu_keeps(
    plan: Plan, dtype: torch.dtype
) -> None:
    q_lens, k_lens = [1, 200, 77, 1, 0], [300, 200, 150, 513, 40]
    q = topical(q_lens, 4, 64, 2).to(dtype)
    k, v = topical(k_lens, 2, 64, 3).to(dtype), topical(k_lens, 2, 48, 4).to(dtype)
    seqs = Seqs.from_lengths(q_lens, k_lens)

    def run(*tensors: torch.Tensor, seqs: Seqs) -> AttentionOutput:
        return attention_varlen(*tensors, seqs, scale=2**-4, plan=plan, details=True)

    cpu, gpu = run(q, k, v, seqs=seqs), run(q.cuda(), k.cuda(), v.cuda(), seqs=on_cuda(seqs))
    assert gpu.out.is_cuda
    for here, there in zip(cpu.kept or (), gpu.kept or (), strict=True):
        assert (here is None) == (there is None)
        assert here is None or torch.equal(here, there.cpu())
    if plan.skip is not None:
        assert gpu.prefill is not None and int(gpu.prefill.skipped[0].sum()) > 0
    atol = 4e-3 if dtype == torch.bfloat16 else 1e-3  # half a step of a bf16 at 2
    torch.testing.assert_close(gpu.lse.cpu(), cpu.lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gpu.out.cpu().float(), cpu.out.float(), rtol=1e-2, atol=atol)


@pytest.mark.parametrize("preset", mtsa.PRESETS)
def test_a_model_on_the_gpu_is_sparse_and_comes_back_to_the_bit(preset: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval().cuda()
    prompt = torch.tensor([[256, *Path(__file__).read_bytes()[:1500]]])
    with torch.no_grad():
        dense = model(prompt.cuda()).logits
        mtsa.sparsify(model, mtsa.PRESETS[preset])
        sparse = model(prompt.cuda()).logits
        host = copy.deepcopy(model).cpu()(prompt).logits
        assert not torch.equal(sparse, dense)
        torch.testing.assert_close(sparse.cpu(), host, rtol=5e-3, atol=5e-3)
        if preset != "sparse_softmax":
            assert sum(sum(s["prefill"]["skipped"]) for s in mtsa.get_stats(model).values()) > 0
        mtsa.unsparsify(model)
        assert torch.equal(model(prompt.cuda()).logits, dense)

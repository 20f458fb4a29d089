"""DeepSeek-V3 from end to end: keys are wider than values, and attention runs on expanded latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.models import build
from torch import Tensor
from transformers import PreTrainedModel

import modelopt_sparse as mtsa
from modelopt_sparse.integrations import hf, module_call
from modelopt_sparse.integrations.hf import ATTENTION_NAME
from modelopt_sparse.kernels import attention_triton
from tests.cpu.tiny import config_of, skipped, snapshot

hf.register()
BATCH, LENGTH, TOKENS = 2, 120, 3
# As the released models have it: scores are scaled by more than the head dim.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}
SKIP = {
    "thresholds": {"prefill": [0.9], "decode": [0.9]},
    "br": 16,
    "bc": 16,
    "decode_block_keys": 16,
}


@pytest.fixture(autouse=True)
def on_the_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_call, "attention_varlen", attention_triton)


def deepseek(attention: str) -> PreTrainedModel:
    """A tiny model, whose queries are long enough for attention to be peaked."""
    model = build("deepseek_v3", attention, max_position_embeddings=256, rope_parameters=YARN)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_b_proj.weight.mul_(8)
    return model


def sparse(backend: str) -> PreTrainedModel:
    return mtsa.sparsify(deepseek("sdpa"), config_of("flash_skip_softmax", backend=backend, **SKIP))


def prompt() -> Tensor:
    return torch.randint(3, 99, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def generated(model: PreTrainedModel, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens of greedy decoding after `prompt()`, and their logits."""
    out = model.generate(
        prompt(),
        attention_mask=torch.ones_like(prompt()),
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["", "static"])
def test_dense_attention_equals_eager(options: dict[str, Any]) -> None:
    tokens, logits = generated(deepseek(ATTENTION_NAME), **options)
    expected = generated(deepseek("eager"))
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], rtol=0, atol=1e-4)


def test_the_kernels_skip_what_the_reference_skips() -> None:
    found = {}
    for backend in ("triton", "pytorch"):
        model = sparse(backend)
        found[backend] = *generated(model), skipped(model), skipped(model, "decode")
    tokens, logits, *counts = found["triton"]
    assert all(count > 0 for phase in counts for count in phase.values())
    assert counts == list(found["pytorch"][2:])
    assert torch.equal(tokens, found["pytorch"][0])
    torch.testing.assert_close(logits, found["pytorch"][1], rtol=0, atol=1e-4)
    dense = generated(deepseek("eager"))
    assert (logits[0] - dense[1][0]).abs().max() > 1e-3  # what was skipped is missed


def test_unsparsify_gives_the_dense_model_back() -> None:
    model = deepseek("sdpa")
    before, logits = snapshot(model), generated(model)[1]
    mtsa.sparsify(model, config_of("flash_skip_softmax", backend="triton", **SKIP))
    assert not torch.equal(generated(model)[1], logits)
    mtsa.unsparsify(model)
    assert snapshot(model) == before
    assert torch.equal(generated(model)[1], logits)

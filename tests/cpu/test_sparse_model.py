"""The shipped model with real text: what is skipped doesn't depend on padding, batch or chunks.

In float64: products of other shapes round otherwise, and in float32 that decides which of two keys N:M keeps.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

import modelopt_sparse as mtsa

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples/tiny_lm/model"
BOS, PAD = 256, 258
CONFIGS = {
    "skip": mtsa.SKIP_SOFTMAX_TRITON_DEFAULT.with_rule(
        "*", skip_softmax_threshold=0.5, skip_softmax_decode_threshold=0.5
    ),
    "flash": mtsa.SKIP_SOFTMAX_DEFAULT.with_rule(
        "*", thresholds={"prefill": [0.5, 0.9], "decode": [0.9]}, br=32, bc=32
    ),
    "nm": mtsa.SPARSE_SOFTMAX_DEFAULT.with_rule("*", num_sink_tokens=2, dense_window_size=16),
}


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    """A prompt of 500 bytes of source: [1, 501]."""
    return torch.tensor([[BOS, *Path(__file__).read_bytes()[:500]]])


@pytest.fixture(params=CONFIGS)
def model(request) -> nn.Module:
    dense = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64).eval()
    return mtsa.sparsify(dense, CONFIGS[request.param])


@pytest.fixture
def is_skipping(model: nn.Module) -> bool:
    return "skip" in next(iter(mtsa.get_stats(model).values()))["method"]


def counts(model: nn.Module, phase: str = "prefill") -> list[tuple[list[int], list[int]]]:
    found = [entry[phase] for entry in mtsa.get_stats(model).values()]
    mtsa.reset_stats(model)
    return [(data["visible"], data["skipped"]) for data in found if data is not None]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_logits_nor_tiles(model, is_skipping, text, side):
    whole = model(text).logits
    wanted = counts(model)
    n, padding = text.shape[1], 37
    at = padding if side == "left" else 0
    padded = torch.full((1, n + padding), PAD)
    mask = torch.zeros_like(padded)
    padded[:, at : at + n], mask[:, at : at + n] = text, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, at : at + n]
    torch.testing.assert_close(logits, whole, rtol=1e-6, atol=1e-6)
    assert counts(model) == wanted
    if is_skipping:
        assert all(sum(skipped) > 0 for _, skipped in wanted)


@torch.no_grad()
def test_a_batch_is_its_rows_and_counts_their_tiles(model, text):
    short = text[:, :301]
    alone = [model(text).logits, model(short).logits]
    apart = counts(model)
    batch = torch.full((2, text.shape[1]), PAD)
    batch[0], batch[1, : short.shape[1]] = text[0], short[0]
    logits = model(batch, attention_mask=(batch != PAD).long()).logits
    together = counts(model)
    torch.testing.assert_close(logits[:1], alone[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits[1:, :301], alone[1], rtol=1e-6, atol=1e-6)
    assert together == apart


@torch.no_grad()
def test_chunks_that_end_on_the_grid_skip_what_the_whole_prompt_skips(model, is_skipping, text):
    whole = model(text).logits
    wanted = counts(model)
    cache, pieces = DynamicCache(config=model.config), []
    for chunk in text.split(128, dim=1):
        pieces.append(model(chunk, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-6, atol=1e-6)
    assert counts(model) == wanted
    assert bool(wanted) == is_skipping


@torch.no_grad()
def test_generated_tokens_decode_by_their_own_threshold(model, is_skipping, text):
    model.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=4, do_sample=False)
    decoded = counts(model, "decode")
    assert bool(decoded) == is_skipping
    # Eight tiles of 64 keys, then one new one on the way: three steps after the prompt.
    for visible, skipped in decoded:
        assert visible == [24] * 6
        assert all(0 <= s < v for s, v in zip(skipped, visible, strict=True))
    assert not decoded or sum(sum(skipped) for _, skipped in decoded) > 0


@torch.no_grad()
def test_a_part_of_a_model_refuses_a_chunk_without_a_mask(text):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64).eval()
    mtsa.sparsify(model, CONFIGS["skip"])
    attention = model.model.layers[0].self_attn
    q, k = torch.zeros(1, 6, 5, 64), torch.zeros(1, 2, 9, 64)
    with pytest.raises(
        mtsa.UnsupportedCall, match="attention_mask: got None with 5 rows and 9 keys"
    ):
        mtsa.integrations.hf.modelopt_triton_attention(attention, q, k, k, None)


@torch.no_grad()
def test_thresholds_that_are_only_counted_are_named_with_their_tiles(text):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64).eval()
    mtsa.sparsify(model, CONFIGS["flash"])
    model(text)
    for entry in mtsa.get_stats(model).values():
        (counted,) = entry["prefill"]["counted"]
        assert counted["threshold"] == 0.9
        assert all(
            c >= s for c, s in zip(counted["skipped"], entry["prefill"]["skipped"], strict=True)
        )
        assert sum(counted["skipped"]) > sum(entry["prefill"]["skipped"])

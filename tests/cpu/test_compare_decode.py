"""Dense against sparse where the last tokens are decoded one by one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import modelopt_sparse as mtsa
from tests.cpu.test_compare import COARSE, padded, sparse_llama
from tests.cpu.tiny import LENGTH, logits, prompt

DECODED = 5


@torch.no_grad()
def decoded_logits(model, ids):
    """[DECODED, V], each from a call with one token."""
    cache = model(ids[:, :-DECODED], use_cache=True).past_key_values
    steps = [model(x, past_key_values=cache).logits for x in ids[:, -DECODED:].split(1, 1)]
    return torch.cat(steps, 1)[0]


def test_only_what_decoded_tokens_predict_is_scored():
    model, ids = sparse_llama(COARSE), prompt()
    found = mtsa.compare(model, [ids], num_decode_tokens=DECODED)
    came = ids[0, 1 - DECODED :]
    mtsa.disable_sparse_attention(model)
    dense = logits(model, ids)[0, -DECODED:-1]
    mtsa.enable_sparse_attention(model)
    sparse = decoded_logits(model, ids)[:-1]
    bits = [F.cross_entropy(x, came).item() / math.log(2) for x in (dense, sparse)]
    assert found.tokens == DECODED - 1
    assert [found.dense_bits, found.sparse_bits] == pytest.approx(bits, rel=1e-9)
    assert abs(bits[1] - bits[0]) > 1e-6


def test_modules_are_compared_in_both_phases():
    model = sparse_llama()
    found = mtsa.compare(model, [prompt(), prompt(seed=1)], num_decode_tokens=DECODED)
    mtsa.reset_stats(model)
    for seed in (0, 1):
        decoded_logits(model, prompt(seed=seed))
    stats = mtsa.get_stats(model)
    for name, module in found.modules.items():
        assert module.prefill.rows == 2 * (LENGTH - DECODED) and module.decode.rows == 2 * DECODED
        assert module.decode.relative_error.overall > 0
        assert module.decode.dropped_mass.mean.overall > 0
        for phase in ("prefill", "decode"):
            assert getattr(module, phase).sparsity.overall == stats[name][phase]["sparsity"] > 0


def test_a_batch_padded_on_the_left_is_its_prompts_alone():
    model = sparse_llama()
    batch, alone = padded(300, 200, side="left")
    del batch["position_ids"]  # positions of one token differ by a shift, which rotations don't see
    together, apart = (
        mtsa.compare(model, batches, num_decode_tokens=DECODED) for batches in ([batch], alone)
    )
    assert together.tokens == apart.tokens == 2 * (DECODED - 1)
    assert together.kl_bits.value == pytest.approx(apart.kl_bits.value, rel=1e-4)
    for one, other in zip(together.modules.values(), apart.modules.values(), strict=True):
        for phase in ("prefill", "decode"):
            one_phase, other_phase = getattr(one, phase), getattr(other, phase)
            assert one_phase.rows == other_phase.rows
            assert one_phase.sparsity == other_phase.sparsity
            assert one_phase.relative_error.heads == pytest.approx(
                other_phase.relative_error.heads, rel=1e-4
            )


REFUSED = {
    "padding behind": (
        padded(300, 200)[0],
        ValueError,
        r"inputs\[0\]: got shorter ones, or padding",
    ),
    "short": (prompt(DECODED), ValueError, "end with 6 tokens of text"),
    "positions": (
        {"input_ids": prompt(), "position_ids": torch.arange(LENGTH)[None]},
        NotImplementedError,
        r"inputs\[0\]: got position_ids; takes input_ids and attention_mask alone",
    ),
}
del REFUSED["padding behind"][0]["position_ids"]


@pytest.mark.parametrize("case", REFUSED)
def test_batches_that_can_not_be_decoded_are_refused(case):
    batch, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as caught:
        mtsa.compare(sparse_llama(), [batch], num_decode_tokens=DECODED)
    assert isinstance(caught.value, mtsa.SparseAttentionError)


@pytest.mark.parametrize("count", [1, -1, 2.0, True, "2"])
def test_numbers_of_tokens_that_are_not_taken(count):
    with pytest.raises(mtsa.ArgumentError, match="num_decode_tokens: got"):
        mtsa.compare(sparse_llama(), [prompt(50)], num_decode_tokens=count)


def test_a_model_that_returns_no_cache_can_not_decode():
    model = sparse_llama()

    def without_cache(module, args, output):
        output.past_key_values = None

    model.register_forward_hook(without_cache)
    assert mtsa.compare(model, [prompt(50)]).tokens == 49
    message = "a LlamaForCausalLM whose output has no past_key_values; takes one that returns"
    with pytest.raises(mtsa.UnsupportedModel, match=message):
        mtsa.compare(model, [prompt(50)], num_decode_tokens=DECODED)

"""Decode through transformers' static cache, captured in a CUDA graph."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import StaticCache

import modelopt_sparse as mtsa
from modelopt_sparse.bench.decode_step import captured
from modelopt_sparse.integrations import hf
from tests.cpu.tiny import config_of, prompt, skipped, tiny_llama
from tests.gpu.calls import DEVICE, needs_cuda

pytestmark = needs_cuda
BATCH, LENGTH, CAPACITY, STEPS = 2, 60, 90, 4


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """Not here: what is captured must be torch's own functions."""


def model_of(is_sparse):
    hf.register()
    model = tiny_llama(hf.ATTENTION_NAME)
    if is_sparse:
        threshold = dict.fromkeys(("skip_softmax_threshold", "skip_softmax_decode_threshold"), 0.1)
        mtsa.sparsify(model, config_of("triton_skip_softmax", decode_block_keys=16, **threshold))
    return model.to(DEVICE)


@torch.no_grad()
@pytest.mark.parametrize("is_padded", [False, True], ids=["no mask", "2-D mask"])
@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
def test_a_captured_step_is_the_eager_one(is_sparse, is_padded):
    model, mask = model_of(is_sparse), None
    if is_padded:
        mask = torch.ones(BATCH, CAPACITY, dtype=torch.int64, device=DEVICE)
        mask[0, :21] = 0

    def prefilled():
        cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
        padding = None if mask is None else mask[:, :LENGTH]
        ids = prompt(LENGTH, BATCH).to(DEVICE)
        logits = model(ids, attention_mask=padding, past_key_values=cache).logits
        return cache, logits[:, -1:].argmax(-1)

    def step(cache, token):
        return model(token, attention_mask=mask, past_key_values=cache).logits

    cache, token = prefilled()
    expected = []
    for _ in range(STEPS):
        expected.append(step(cache, token))
        token = expected[-1].argmax(-1)
    if is_sparse:
        assert all(skipped(model, "decode").values())
    counted = skipped(model, "decode")

    cache, token = prefilled()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(cache, token)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(cache, token)
    for layer in cache.layers:
        layer.cumulative_length.fill_(LENGTH)
    after_warm_up = skipped(model, "decode")
    for wanted in expected:
        graph.replay()
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
        token.copy_(logits.argmax(-1))
    assert skipped(model, "decode") == after_warm_up
    assert all(after_warm_up[name] >= count for name, count in counted.items())


def test_a_captured_function_keeps_what_it_reads():
    ones = torch.ones(2**22, device=DEVICE)
    replay = captured(partial(torch.mul, ones, 2), torch.device(DEVICE))
    del ones
    # Takes the place of what nobody holds.
    taken = torch.full((2**22,), torch.nan, device=DEVICE)
    assert (replay() == 2).all()
    assert taken.isnan().all()

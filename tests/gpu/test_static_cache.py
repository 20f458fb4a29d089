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


TABLE = {"lengths": [32, 128], "targets": [0.2, 0.8], "factors": [[2.0, 20.0], [4.0, 40.0]]}
THRESHOLDS = {
    "dense": None,
    "sparse": 0.1,
    "calibrated": {"target_sparsity": 0.6, "table": TABLE},
}


def model_of(threshold):
    hf.register()
    model = tiny_llama(hf.ATTENTION_NAME)
    if threshold:
        phases = ("skip_softmax_threshold", "skip_softmax_decode_threshold")
        fields = dict.fromkeys(phases, threshold)
        mtsa.sparsify(model, config_of("triton_skip_softmax", decode_block_keys=16, **fields))
    return model.to(DEVICE)


@torch.no_grad()
@pytest.mark.parametrize("is_padded", [False, True], ids=["no mask", "2-D mask"])
@pytest.mark.parametrize("threshold", THRESHOLDS.values(), ids=THRESHOLDS)
def test_a_captured_step_is_the_eager_one(threshold, is_padded):
    model, mask = model_of(threshold), None
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
    if threshold:
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

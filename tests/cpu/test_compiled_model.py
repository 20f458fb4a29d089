"""A model under torch.compile, with the kernels in Triton's interpreter: one graph for all shares."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import modelopt_sparse as mtsa
from modelopt_sparse.integrations import module_call
from modelopt_sparse.kernels import attention_triton
from tests.cpu.tiny import config_of, prompt, tiny_llama
from tests.inputs import needs_interpreter

pytestmark = [needs_interpreter, pytest.mark.slow]

LENGTHS, SHARES = [32, 64, 128], [0.1, 0.5, 0.9]
FACTORS = [[2.0, 8.0, 40.0], [2.0, 12.0, 60.0], [3.0, 20.0, 100.0]]
THRESHOLDS = {
    "formula": {"formula": {"a": 1.0, "b": 5.0}},
    "table": {"table": {"lengths": LENGTHS, "targets": SHARES, "factors": FACTORS}},
    "heads": {
        "table": {
            "lengths": LENGTHS,
            "targets": SHARES,
            "factors": [[[x, 2 * x] for x in row] for row in FACTORS],
        }
    },
}


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """Not here: what is traced must be torch's own functions."""


@pytest.fixture
def compiled(monkeypatch):
    """Makes of a model a compiled one, and a count of graphs."""
    monkeypatch.setattr(module_call, "attention_varlen", attention_triton)
    torch._dynamo.reset()

    def make(model):
        counter = CompileCounterWithBackend("aot_eager")
        return torch.compile(model, fullgraph=True, backend=counter), counter

    return make


def sparse_model(threshold, **fields):
    phases = {"prefill": [threshold]}
    config = config_of(
        "flash_skip_softmax", backend="triton", thresholds=phases, br=16, bc=16, **fields
    )
    return mtsa.sparsify(tiny_llama(num_hidden_layers=1), config)


def logits(model):
    return model(prompt(50), use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("form", THRESHOLDS)
def test_another_share_takes_no_other_graph(form, compiled):
    model = sparse_model({"target_sparsity": 0.5, **THRESHOLDS[form]}, min_context=20)
    run, counter = compiled(model)
    seen = [logits(run)]
    graphs = counter.frame_count
    for share in (0.1, 0.5, 0.9, 0.9):
        mtsa.set_sparsity(model, share)
        seen.append(logits(run))
        assert torch.equal(seen[-1], logits(model)), share
    assert counter.frame_count == graphs
    assert not torch.equal(seen[1], seen[3]) and torch.equal(seen[3], seen[4])


@torch.no_grad()
def test_calls_that_are_compiled_are_not_counted(compiled):
    model = sparse_model(0.1)
    run, counter = compiled(model)
    logits(model)
    before = mtsa.get_stats(model)
    logits(run)
    graphs = counter.frame_count
    logits(run), logits(run)
    assert mtsa.get_stats(model) == before
    assert counter.frame_count == graphs

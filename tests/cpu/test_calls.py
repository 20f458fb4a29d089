"""A call in pieces is the whole call: who observes a module may look at any rows of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modelopt_sparse as mtsa
from modelopt_sparse.calls import AttentionCall
from modelopt_sparse.kernels import (
    DENSE,
    Phase,
    Plan,
    ScoreGrid,
    SkipSoftmax,
    SkipSoftmaxDecode,
    attention_reference,
)
from modelopt_sparse.module import observed
from modelopt_sparse.module_state import sparse_modules
from tests.cpu import tiny
from tests.inputs import topical

CUTS = (64, 128, 256)
ROWS, LENGTHS = [200, 0, 90, 1], [200, 40, 170, 130]
PLAN = Plan(skip=SkipSoftmax(0.5, 16, 16), skip_decode=SkipSoftmaxDecode(0.5, 16, 64))


def options(inputs, name: str) -> dict:
    heads = inputs.q.shape[1]
    longest = max(LENGTHS)
    generator = torch.Generator().manual_seed(0)
    shape = (len(ROWS), 1, max(ROWS) + 3, longest + 5)
    starts = torch.tensor([3, 0, 1, 2], dtype=torch.int32)
    bounds = torch.zeros(len(inputs.q), 2, dtype=torch.int32)
    for start, n_q, n_k in zip(inputs.seqs.q_start.tolist(), ROWS, LENGTHS, strict=True):
        ends = torch.arange(n_k - n_q, n_k) + 1
        bounds[start : start + n_q] = torch.stack([(ends - 50).clamp(min=0), ends], 1).int()
    return {
        "plain": {},
        "window": {"window": 60},
        "sinks": {"sinks": torch.linspace(-1, 1, heads)},
        "mask": {"mask": ScoreGrid(torch.rand(shape, generator=generator) > 0.3, starts, starts)},
        "bias": {"bias": ScoreGrid(torch.randn(shape, generator=generator))},
        "bounds": {"bounds": bounds},
        "bidirectional": {"causal": False, "phase": Phase.PREFILL},
    }[name]


@pytest.mark.parametrize(
    "name", ["plain", "window", "sinks", "mask", "bias", "bounds", "bidirectional"]
)
def test_pieces_are_the_whole(name):
    inputs = topical(ROWS, LENGTHS, dim=16, strength=3.0, span=16, dtype=torch.float32)
    how = options(inputs, name)
    call = AttentionCall(attention_reference, *inputs.qkv, how)
    whole, pieces = call(PLAN), list(call.pieces(CUTS))
    out = torch.zeros_like(whole.out)
    skipped = {phase: 0 for phase in Phase}
    for piece in pieces:
        found = piece.call(PLAN)
        out[piece.rows] = found.out
        counts = found.prefill if piece.phase is Phase.PREFILL else found.decode
        skipped[piece.phase] += counts.skipped
    torch.testing.assert_close(out, whole.out)
    assert torch.equal(skipped[Phase.PREFILL], whole.prefill.skipped)
    assert int(whole.prefill.skipped.sum()) > 0
    if name == "bidirectional":
        assert [piece.position for piece in pieces] == [0, 0, 0]
        return
    assert torch.equal(skipped[Phase.DECODE], whole.decode.skipped)
    assert [(piece.position, piece.n_k) for piece in pieces] == [
        (0, 200), (64, 200), (128, 200), (80, 170), (128, 170), (129, 130)
    ]  # fmt: skip


@torch.no_grad()
def test_the_model_goes_on_with_what_an_observer_returns():
    model = mtsa.sparsify(tiny.tiny_llama(), tiny.SKIP)
    sparse = tiny.logits(model)
    dense = tiny.logits(mtsa.disable_sparse_attention(model))
    mtsa.enable_sparse_attention(model)
    seen = []

    def observer(call: AttentionCall, plan: Plan):
        seen.append(plan)
        return call(DENSE)

    modules: list[nn.Module] = [module for _, module in sparse_modules(model)]
    with observed(dict.fromkeys(modules, observer)):
        assert torch.equal(tiny.logits(model), dense)
        with pytest.raises(ZeroDivisionError), observed({modules[0]: lambda *_: 1 / 0}):
            tiny.logits(model)
        assert all(module.observer is observer for module in modules)
    assert len(seen) >= len(modules) and all(plan.skip is not None for plan in seen)
    assert torch.equal(tiny.logits(model), sparse) and not torch.equal(sparse, dense)

"""The plan in force: nested, after exceptions, between threads, and in recomputed forwards."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import modelopt_sparse as mtsa
from modelopt_sparse.integrations import module_call
from modelopt_sparse.kernels.types import DENSE
from modelopt_sparse.methods import TritonSkipSoftmax, TritonSkipSoftmaxConfig
from tests.cpu import tiny
from tests.cpu.tiny import ATTENTION, FLASH, NM, SKIP, logits, skipped

# The newer name is not known to the oldest transformers that is supported.
pytestmark = pytest.mark.filterwarnings("ignore:.*activation_checkpointing_enable:FutureWarning")


def _module(model, layer=0):
    return model.get_submodule(ATTENTION[layer])


def test_a_context_within_a_context_restores_the_outer_plan():
    module = _module(mtsa.sparsify(tiny.tiny_llama(), SKIP))
    inner = TritonSkipSoftmax(TritonSkipSoftmaxConfig(skip_softmax_threshold=0.5))
    assert module.active_plan is None
    with module.method.get_sparse_context(module) as first:
        assert module.active_plan is first
        with inner.get_sparse_context(module) as second:
            assert module.active_plan is second
            assert (first.skip.threshold, second.skip.threshold) == (0.1, 0.5)
        assert module.active_plan is first
        with module.method.get_sparse_context(module):
            pass
        assert module.active_plan is first
        with pytest.raises(KeyError), inner.get_sparse_context(module):
            raise KeyError
        assert module.active_plan is first
    assert module.active_plan is None


def test_the_active_plan_is_set_during_a_call_and_only_then(monkeypatch):
    model = mtsa.sparsify(tiny.tiny_llama(), SKIP)
    seen = []

    def attend(*args, plan, **kwargs):
        seen.append([_module(model, layer).active_plan is plan for layer in (0, 1)])
        return original(*args, plan=plan, **kwargs)

    original = module_call.attention_varlen
    monkeypatch.setattr(module_call, "attention_varlen", attend)
    logits(model)
    assert seen == [[True, False], [False, True]]
    assert _module(model).active_plan is None


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_forward_that_fails_leaves_no_plan_behind(failure, monkeypatch):
    model = mtsa.sparsify(tiny.tiny_llama(), SKIP)
    expected = logits(model)

    def broken(*args, **kwargs):
        raise failure("injected")

    with monkeypatch.context() as patch:
        patch.setattr(module_call, "attention_varlen", broken)
        with pytest.raises(failure):
            logits(model)
    assert all(_module(model, layer).active_plan is None for layer in (0, 1))
    assert all(_module(model, layer).enabled for layer in (0, 1))
    assert torch.equal(logits(model), expected)


def _in_threads(*work, times=3):
    """What each function returns, run at the same time, several times."""
    barrier = threading.Barrier(len(work))

    def run(function):
        out = []
        for _ in range(times):
            barrier.wait(60)
            out.append(function())
        return out

    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result() for future in [pool.submit(run, function) for function in work]]


def test_a_sparse_and_a_dense_model_in_two_threads_compute_what_they_do_alone():
    sparse, dense = mtsa.sparsify(tiny.tiny_llama(), FLASH), tiny.tiny_llama("modelopt_triton")
    alone = [logits(sparse), logits(dense)]
    assert not torch.equal(*alone)
    together = _in_threads(lambda: logits(sparse), lambda: logits(dense))
    for expected, outs in zip(alone, together, strict=True):
        assert all(torch.equal(out, expected) for out in outs)


def test_two_threads_on_one_model_compute_what_one_does():
    model = mtsa.sparsify(tiny.tiny_llama(), FLASH)
    ids = [tiny.prompt(seed=seed) for seed in (0, 1)]
    alone = [logits(model, each) for each in ids]
    together = _in_threads(lambda: logits(model, ids[0]), lambda: logits(model, ids[1]))
    for expected, outs in zip(alone, together, strict=True):
        assert all(torch.equal(out, expected) for out in outs)
    assert sum(skipped(model).values()) > 0


def test_a_call_uses_the_plan_that_its_own_context_yields(monkeypatch):
    model = mtsa.sparsify(tiny.tiny_llama(), SKIP)
    expected = logits(model)

    def meddling(*args, **kwargs):
        # What another thread on the same module does.
        _module(model).active_plan = DENSE
        return original(*args, **kwargs)

    original = module_call.pack
    monkeypatch.setattr(module_call, "pack", meddling)
    assert torch.equal(logits(model), expected)


def _gradients(model, between=lambda model: None, **checkpointing):
    """Gradients of a loss, with something done between forward and backward."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    out = model(tiny.prompt(length=176), use_cache=False).logits
    between(model)
    out.square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _evaluate(model):
    mtsa.disable_sparse_attention(model)
    logits(model.eval())
    model.train()


BETWEEN = {
    "nothing": lambda model: None,
    "disable": mtsa.disable_sparse_attention,
    "an evaluation, disabled": _evaluate,
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("config", [FLASH, NM], ids=["flash", "nm"])
def test_gradient_checkpointing_gives_the_same_gradients(config, reentrant, between):
    expected = _gradients(mtsa.sparsify(tiny.tiny_llama(), config))
    dense = _gradients(tiny.tiny_llama("modelopt_triton"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(expected[name], dense[name], rtol=1e-3)
    model = mtsa.sparsify(tiny.tiny_llama(), config)
    if reentrant:
        model.enable_input_require_grads()
    gradients = _gradients(model, BETWEEN[between], use_reentrant=reentrant)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_a_recomputed_forward_is_not_counted_again(reentrant):
    plain, model = (mtsa.sparsify(tiny.tiny_llama(), FLASH) for _ in range(2))
    _gradients(plain)
    model.enable_input_require_grads()
    _gradients(model, use_reentrant=reentrant)
    assert mtsa.get_stats(model) == mtsa.get_stats(plain)
    assert all(count > 0 for count in skipped(model).values())


def test_a_module_that_is_enabled_between_forward_and_backward_repeats_the_dense_forward():
    expected = _gradients(tiny.tiny_llama("modelopt_triton"))
    model = mtsa.disable_sparse_attention(mtsa.sparsify(tiny.tiny_llama(), FLASH))
    gradients = _gradients(model, mtsa.enable_sparse_attention, use_reentrant=False)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
    assert not any(skipped(model).values())

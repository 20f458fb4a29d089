"""Decode through transformers' caches: its own kernel, on the cache as it lies, without a host read."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conformance.models import build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Cache,
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    StaticCache,
)

import modelopt_sparse as mtsa
from modelopt_sparse.integrations import hf, masks, module_call, packing
from modelopt_sparse.integrations.hf import ATTENTION_NAME
from modelopt_sparse.kernels import AttentionOutput, Seqs, attention_triton, forward
from tests.cpu.tiny import LENGTH, config_of, prompt, skipped, tiny_config, tiny_llama
from tests.thinned import thinned

hf.register()
TOKENS, CAPACITY, WINDOW = 4, 24, 192
CACHES = ["dynamic", "static"]
THRESHOLDS = {
    "skip_softmax_threshold": 0.1,
    "skip_softmax_decode_threshold": 0.1,
    "decode_block_keys": 16,
}


def cache_of(model: PreTrainedModel, kind: str, capacity: int = CAPACITY) -> Cache:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=capacity)


class DecodeCalls(list[tuple[Tensor, Tensor, Seqs]]):
    """The calls of one row an item: which kernels they launch, and whether they read `cache` itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache: Cache | None = None
        self.launched: list[str] = []
        self.copies = 0
        monkeypatch.setattr(module_call, "attention_varlen", self._attend)
        for name in ("launch_prefill", "launch_decode"):
            monkeypatch.setattr(forward, name, self._launching(name, getattr(forward, name)))

    def _launching(self, name: str, launch: Any) -> Any:
        def launching(*args: Any, **options: Any) -> None:
            self.launched.append(name)
            launch(*args, **options)

        return launching

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, seqs: Seqs, **options: Any
    ) -> AttentionOutput:
        before = len(self.launched)
        output = attention_triton(q, k, v, seqs, **options)
        if seqs.max_q > 1:
            del self.launched[before:]
            return output
        self.append((k, v, seqs))
        assert self.cache is not None
        self.copies += not any(
            lies_in(k, layer.keys) and lies_in(v, layer.values) for layer in self.cache.layers
        )
        return output


def lies_in(view: Tensor, whole: Tensor | None) -> bool:
    if whole is None:
        return False
    storage = whole.untyped_storage()
    first, last = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    return first <= view.data_ptr() < last


def generated(model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor, tokens: int) -> Any:
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits)


@thinned(2, family=["llama", "mistral", "gemma2"], kind=CACHES, shape=[(1, 0), (2, 0), (2, 3)])
def test_decode_runs_its_kernel_on_the_cache_itself(
    family: str, kind: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, padding = shape
    ids = torch.randint(3, 99, (batch, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    eager = build(family, "eager")
    expected = generated(eager, cache_of(eager, kind), ids, mask, TOKENS)
    model = build(family, ATTENTION_NAME)
    calls = DecodeCalls(monkeypatch)
    calls.cache = cache_of(model, kind)
    tokens, logits = generated(model, calls.cache, ids, mask, TOKENS)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], rtol=0, atol=1e-5)
    steps = (TOKENS - 1) * model.config.num_hidden_layers
    assert len(calls) == steps and calls.launched == ["launch_decode"] * steps
    assert calls.copies == 0


def sliding_model(attention: str) -> MistralForCausalLM:
    """The tiny Llama's weights under a window of fewer tokens than the prompt has."""
    llama = tiny_llama()
    config = MistralConfig(**{**tiny_config().to_dict(), "sliding_window": WINDOW})
    model = MistralForCausalLM._from_config(config, attn_implementation=attention).eval()
    model.load_state_dict(llama.state_dict())
    return model


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("window", [None, WINDOW])
def test_a_decode_threshold_skips_what_the_reference_skips(
    kind: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = DecodeCalls(monkeypatch)
    found = {}
    for backend in ("triton", "pytorch"):
        model = tiny_llama() if window is None else sliding_model("sdpa")
        mtsa.sparsify(model, config_of("triton_skip_softmax", backend=backend, **THRESHOLDS))
        calls.cache = cache_of(model, kind, LENGTH + 20)
        ids = prompt()
        _, logits = generated(model, calls.cache, ids, torch.ones_like(ids), 4)
        found[backend] = logits, skipped(model, "decode"), mtsa.get_stats(model)
    assert len(calls) == 3 * model.config.num_hidden_layers and calls.copies == 0
    assert all(count > 0 for count in found["triton"][1].values())
    assert found["triton"][1] == found["pytorch"][1]
    torch.testing.assert_close(found["triton"][0], found["pytorch"][0], rtol=0, atol=1e-4)


@torch.no_grad()
def decoded(model: PreTrainedModel, unused: float, tokens: int = 3) -> Tensor:
    """Logits of decode with a static cache whose unused slots hold `unused`."""
    ids = prompt(60, batch=2)
    cache = cache_of(model, "static", 90)
    logits = [model(ids, past_key_values=cache).logits[:, -1]]
    for layer in cache.layers:
        layer.keys[:, :, ids.shape[1] :] = unused
        layer.values[:, :, ids.shape[1] :] = unused
    for _ in range(tokens):
        step = model(logits[-1].argmax(-1, keepdim=True), past_key_values=cache)
        logits.append(step.logits[:, -1])
    return torch.stack(logits)


@thinned(2, is_sliding={"full": False, "sliding": True}, is_sparse={"dense": False, "sparse": True})
def test_what_unused_slots_of_a_static_cache_hold_changes_no_bit(
    is_sliding: bool, is_sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_call, "attention_varlen", attention_triton)
    model = sliding_model(ATTENTION_NAME) if is_sliding else tiny_llama(ATTENTION_NAME)
    if is_sparse:
        mtsa.sparsify(model, config_of("triton_skip_softmax", **THRESHOLDS))
    clean = decoded(model, 0.0)
    assert clean.isfinite().all()
    assert torch.equal(decoded(model, torch.nan), clean)
    if is_sparse:
        assert all(count > 0 for count in skipped(model, "decode").values())


class NoTransfers(TorchDispatchMode):
    """Tensors that move to or from a GPU make the host wait, and can't be captured."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in (*args, out) if isinstance(x, Tensor)]
        if func._schema.name in ("aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense"):
            assert len({x.device.type for x in inputs}) == 1, func
        return out


def outputs_of_nothing(q: Tensor, k: Tensor, v: Tensor, seqs: Seqs, **options: Any) -> Any:
    assert seqs.max_q == 1
    assert {x.device for x in (seqs.q_start, seqs.q_len, seqs.k_start, seqs.k_len)} == {q.device}
    lse = q.new_zeros(q.shape[:2])
    return AttentionOutput(q.new_zeros(*q.shape[:2], v.shape[-1]), lse)


@pytest.mark.parametrize("has_mask", [False, True], ids=["no mask", "2-D mask"])
@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3"])
def test_a_step_with_a_static_cache_can_be_captured(
    family: str, is_sparse: bool, has_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On the meta device, where tensors have no values: to read one raises.
    for part in (masks, packing, module_call):
        monkeypatch.setattr(part, "is_capturing", lambda device: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: nullcontext())
    monkeypatch.setattr(module_call, "attention_varlen", outputs_of_nothing)
    model = build(family, ATTENTION_NAME).to("meta", torch.bfloat16)
    if is_sparse:
        mtsa.sparsify(model, config_of("triton_skip_softmax", **THRESHOLDS))
    ids = torch.ones(2, 1, dtype=torch.int64, device="meta")
    mask = torch.ones(2, 4, dtype=torch.int64, device="meta") if has_mask else None
    cache = cache_of(model, "static")
    with torch.no_grad():
        model(ids, past_key_values=cache)  # allocates
        with NoTransfers():
            out = model(ids, attention_mask=mask, past_key_values=cache)
    assert out.logits.shape[:2] == (2, 1)


@pytest.mark.parametrize("kind", CACHES)
def test_padding_decides_in_a_capture_as_outside_of_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_call, "attention_varlen", attention_triton)
    ids, padding = prompt(60, batch=2), torch.ones(2, 60, dtype=torch.int64)
    padding[0, :21] = 0
    found = []
    for is_capturing in (False, True):
        monkeypatch.setattr(masks, "is_capturing", lambda device, answer=is_capturing: answer)
        model = tiny_llama()
        mtsa.sparsify(model, config_of("triton_skip_softmax", **THRESHOLDS))
        out = generated(model, cache_of(model, kind, 90), ids, padding, 4)
        found.append((*out, skipped(model, "decode")))
    (tokens, logits, counts), (in_capture, logits_in_capture, counts_in_capture) = found
    assert torch.equal(tokens, in_capture) and counts == counts_in_capture
    assert all(count > 0 for count in counts.values())
    torch.testing.assert_close(logits, logits_in_capture, rtol=0, atol=1e-5)


def test_calls_in_a_captured_graph_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    mtsa.sparsify(model, config_of("triton_skip_softmax", **THRESHOLDS))
    monkeypatch.setattr(module_call, "is_capturing", lambda device: True)
    with torch.no_grad():
        model(prompt())
    assert not any(skipped(model).values())
    monkeypatch.undo()
    with torch.no_grad():
        model(prompt())
    assert all(skipped(model).values())

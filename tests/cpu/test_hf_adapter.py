"""The attention function that transformers calls: what it honours, what it refuses, what it leaves alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from conformance.models import build
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from modelopt_sparse.errors import ArgumentError, UnsupportedCall
from modelopt_sparse.integrations import hf, module_call
from modelopt_sparse.integrations.hf import ATTENTION_NAME, modelopt_triton_attention
from modelopt_sparse.kernels.types import NMSparsity, Plan, SkipSoftmax
from modelopt_sparse.methods import SparseMethod, SparseMethodConfig
from modelopt_sparse.module import SparseAttentionModule

B, HQ, HK, L, D = 2, 4, 2, 10, 8
LEFT_PADDING = torch.ones(B, L, dtype=torch.long)
LEFT_PADDING[0, :3] = 0
hf.register()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(n_q: int = L, n_kv: int = L) -> tuple[Tensor, Tensor, Tensor]:
    return random(B, HQ, n_q, D), random(B, HK, n_kv, D, seed=1), random(B, HK, n_kv, D, seed=2)


def call(module: nn.Module, *tensors: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    out, weights = modelopt_triton_attention(module, *(tensors or qkv()), mask, **options)
    assert weights is None
    return out


class Attention(nn.Module):
    """A module with the attributes that are given, and no others."""

    def __init__(self, **attributes: Any):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def eager(
    visible: Tensor,
    *tensors: Tensor,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | float = 0.0,
    scaling: float = D**-0.5,
) -> Tensor:
    q, k, v = tensors or qkv()
    k, v = (x.repeat_interleave(HQ // HK, 1) for x in (k, v))
    scores = q @ k.mT * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = (scores + position_bias).masked_fill(~visible, -torch.inf)
    if s_aux is not None:
        sink = s_aux[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2)


def triangle(n_q: int = L, n_kv: int = L) -> Tensor:
    return torch.ones(n_q, n_kv, dtype=torch.bool).tril(n_kv - n_q)


FULL = torch.ones(L, L, dtype=torch.bool)


def test_the_attention_and_the_mask_function_are_registered_together() -> None:
    hf.register()
    hf.register()
    assert AttentionInterface()[ATTENTION_NAME] is modelopt_triton_attention
    assert AttentionMaskInterface()[ATTENTION_NAME] is hf.interval_mask


def test_the_name_is_not_taken_for_another_implementation() -> None:
    assert not any(part in ATTENTION_NAME for part in ("flash", "sdpa", "flex", "paged", "/"))


def logits(model: PreTrainedModel, **inputs: Any) -> Tensor:
    ids = torch.randint(3, 99, (B, L), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        out: Tensor = model(input_ids=ids, **inputs)[0]
    return out


def test_the_padding_mask_of_a_model_is_not_lost() -> None:
    model = build("llama", ATTENTION_NAME)
    expected = logits(build("llama"), attention_mask=LEFT_PADDING)[LEFT_PADDING.bool()]
    got = logits(model, attention_mask=LEFT_PADDING)[LEFT_PADDING.bool()]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    unmasked = logits(model)[LEFT_PADDING.bool()]
    assert (unmasked - expected).abs().max() > 0.01


@pytest.mark.parametrize("n_q", [1, 2, L])
@pytest.mark.parametrize(
    ("attributes", "options", "is_causal"),
    [
        ({}, {}, True),
        ({"is_causal": True}, {}, True),
        ({"is_causal": False}, {}, False),
        ({"is_causal": True}, {"is_causal": False}, False),
        ({"is_causal": False}, {"is_causal": True}, True),
        ({"is_causal": False}, {"is_causal": None}, False),
    ],
)
def test_causality_is_the_argument_then_the_attribute_and_never_the_length(
    n_q: int, attributes: dict[str, Any], options: dict[str, Any], is_causal: bool
) -> None:
    tensors = qkv(n_q, L)
    visible = triangle(n_q) if is_causal else FULL[:n_q]
    got = call(Attention(**attributes), *tensors, **options)
    torch.testing.assert_close(got, eager(visible, *tensors), rtol=1e-5, atol=1e-6)


def test_no_mask_means_causal_up_to_the_last_key() -> None:
    tensors = qkv(4, L)
    got = call(Attention(), *tensors)
    torch.testing.assert_close(got, eager(triangle(4), *tensors), rtol=1e-5, atol=1e-6)


SINKS, BIAS = random(HQ, seed=3), random(1, HQ, L, L, seed=4)
HONOURED: dict[str, tuple[dict[str, Any], Callable[[], Tensor]]] = {
    "softcap": ({"softcap": 0.5}, lambda: eager(triangle(), softcap=0.5)),
    "s_aux": ({"s_aux": SINKS}, lambda: eager(triangle(), s_aux=SINKS)),
    "position_bias": (
        {"position_bias": BIAS},
        lambda: eager(triangle(), position_bias=BIAS),
    ),
    "scaling": ({"scaling": 1.0}, lambda: eager(triangle(), scaling=1.0)),
    "sliding_window": (
        {"sliding_window": 3},
        lambda: eager(triangle() & ~triangle().roll(3, 0).tril(-3)),
    ),
    "is_causal": ({"is_causal": False}, lambda: eager(FULL)),
    "cu_seq_lens": (
        {
            "cu_seq_lens_q": torch.tensor([0, 4, L]),
            "cu_seq_lens_k": torch.tensor([0, 4, L]),
            "max_length_q": 6,
            "max_length_k": 6,
        },
        lambda: eager(triangle() & ((torch.arange(L) < 4)[:, None] == (torch.arange(L) < 4)))[:1],
    ),
}


@pytest.mark.parametrize(("options", "expected"), HONOURED.values(), ids=HONOURED.keys())
def test_an_argument_that_changes_attention_changes_it_as_eager_does(
    options: dict[str, Any], expected: Callable[[], Tensor]
) -> None:
    tensors = [x[: 1 if "cu_seq_lens_q" in options else B] for x in qkv()]
    got, plain = call(Attention(), *tensors, **options), call(Attention(), *tensors)
    torch.testing.assert_close(got, expected(), rtol=1e-5, atol=1e-6)
    assert (got - plain).abs().max() > 1e-3


def test_a_mask_says_all_and_a_window_adds_nothing_to_it() -> None:
    got = call(Attention(), mask=triangle()[None, None], sliding_window=3)
    torch.testing.assert_close(got, eager(triangle()), rtol=1e-5, atol=1e-6)


def test_a_window_without_a_mask_is_not_applied_where_attention_is_not_causal() -> None:
    got = call(Attention(is_causal=False), sliding_window=3)
    torch.testing.assert_close(got, eager(FULL), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.1},
        {"output_attentions": True},
        {"indices": torch.zeros(1)},
        {"block_indices": torch.zeros(1)},
        {"sinks": SINKS},
        {"cache": Ellipsis},
        {"head_mask": torch.ones(HQ)},
        {"a_name_nobody_knows": 1},
        {"a_name_nobody_knows": False},
    ],
    ids=str,
)
def test_an_argument_that_is_not_offered_is_an_error_that_names_it(options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedCall, match=f"^{next(iter(options))}: got"):
        call(Attention(), **options)


def test_arguments_that_say_nothing_are_ignored() -> None:
    expected = call(Attention())
    silent = dict.fromkeys(["indices", "sinks", "cache", "a_name_nobody_knows"])
    harmless = {"use_cache": True, "num_items_in_batch": 3, "position_ids": torch.zeros(1, L)}
    assert torch.equal(call(Attention(), **silent, **harmless, output_attentions=False), expected)


@pytest.mark.parametrize("heads", [(4, 3, 3), (4, 2, 1), (2, 4, 4)])
def test_key_heads_that_do_not_divide_the_query_heads_are_an_error(
    heads: tuple[int, int, int],
) -> None:
    with pytest.raises(ArgumentError, match=r"^key and value heads: got"):
        call(Attention(), *(random(B, count, L, D) for count in heads))


def test_groups_of_heads_are_read_off_the_shapes() -> None:
    assert not hasattr(Attention(), "num_key_value_groups")
    torch.testing.assert_close(call(Attention()), eager(triangle()), rtol=1e-5, atol=1e-6)


def test_a_model_without_dropout_trains_and_one_with_dropout_is_refused() -> None:
    logits(build("llama", ATTENTION_NAME).train())
    with pytest.raises(UnsupportedCall, match=r"^dropout: got"):
        logits(build("llama", ATTENTION_NAME, attention_dropout=0.1).train())


def test_the_capacity_of_a_static_cache_is_not_its_length() -> None:
    out = {}
    for name in ("eager", ATTENTION_NAME):
        model = build("llama", name)
        cache = StaticCache(config=model.config, max_cache_len=64)
        first = logits(model, past_key_values=cache, use_cache=True)
        if name == ATTENTION_NAME:
            # Eager attention reads what lies behind the last valid key, times a weight of 0.
            for layer in cache.layers:
                layer.keys[:, :, L:], layer.values[:, :, L:] = torch.nan, torch.inf
        out[name] = torch.cat([first, logits(model, past_key_values=cache, use_cache=True)])
    torch.testing.assert_close(out[ATTENTION_NAME], out["eager"], rtol=0, atol=1e-5)


def gradients(name: str, attention: str, **options: Any) -> dict[str, Tensor]:
    model = build(name, attention, **options)
    ids = torch.randint(3, 99, (B, L), generator=torch.Generator().manual_seed(4))
    inputs = {"input_ids": ids, "attention_mask": LEFT_PADDING}
    if name == "t5":
        inputs["decoder_input_ids"] = ids.flip(1)
        out = model(**inputs).logits
    else:
        out = model(**inputs)[0][LEFT_PADDING.bool()]
    out.square().mean().backward()
    return {
        key: parameter.grad
        for key, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "bert", "t5"])
def test_gradients_equal_those_of_eager_attention(name: str) -> None:
    expected, got = gradients(name, "eager"), gradients(name, ATTENTION_NAME)
    assert expected.keys() == got.keys()
    for key, gradient in expected.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(got[key], gradient, rtol=0, atol=1e-5 * scale, msg=key)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    ids = torch.randint(3, 99, (B, L), generator=torch.Generator().manual_seed(4))
    results = []
    for checkpointing in (False, True):
        model = build("llama", ATTENTION_NAME).train()
        if checkpointing:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model(ids, attention_mask=LEFT_PADDING, labels=ids, use_cache=False).loss.backward()
        results.append({key: p.grad for key, p in model.named_parameters()})
    for key, gradient in results[0].items():
        torch.testing.assert_close(results[1][key], gradient, rtol=1e-5, atol=1e-7)


def test_autocast_lowers_the_inputs_and_not_the_arithmetic() -> None:
    module, tensors = Attention(), qkv()
    lowered = [x.bfloat16() for x in tensors]
    expected = call(module, *lowered)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = call(module, *tensors)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


def test_a_model_under_autocast_is_close_to_eager() -> None:
    out = {}
    for name in ("eager", ATTENTION_NAME):
        model = build("llama", name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out[name] = logits(model, attention_mask=LEFT_PADDING)[LEFT_PADDING.bool()]
    difference = (out["eager"] - out[ATTENTION_NAME]).abs().max()
    assert difference < 0.05 * out["eager"].abs().max()


class Config(SparseMethodConfig):
    method: Literal["of_this_test"] = "of_this_test"


class Method(SparseMethod[Config]):
    Config = Config
    given = Plan()

    def plan(self) -> Plan:
        return self.given


class SparseAttention(SparseAttentionModule, Attention):
    pass


def sparse(plan: Plan, backend: Literal["triton", "pytorch"] = "triton") -> SparseAttention:
    module, method = SparseAttention(), Method(Config(backend=backend))
    method.given = plan
    module.attach(method, enabled=True)
    return module


TWO_OF_FOUR = Plan(nm=NMSparsity(2, 4, 0, 1))


def test_the_plan_of_a_sparse_module_reaches_the_kernel() -> None:
    module = sparse(TWO_OF_FOUR)
    got, dense = call(module), call(Attention())
    assert (got - dense).abs().max() > 1e-3
    module.enabled = False
    assert torch.equal(call(module), dense)


def test_tiles_are_counted_on_the_module_that_is_called() -> None:
    module, other = (sparse(Plan(skip=SkipSoftmax(0.5, 16, 16))) for _ in range(2))
    call(module, random(1, HQ, 64, D), random(1, HK, 64, D), random(1, HK, 64, D))
    assert module.stats.prefill.counts is not None
    assert module.stats.prefill.counts.visible.tolist() == [10] * HQ
    assert other.stats.prefill.counts is None


@pytest.mark.parametrize("backend", ["triton", "pytorch"])
def test_the_backend_of_the_method_chooses_the_kernel_function(
    backend: Literal["triton", "pytorch"], monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def noting(name: str) -> None:
        function = getattr(module_call, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(module_call, name, noted)

    noting("attention_varlen")
    noting("attention_reference")
    call(sparse(TWO_OF_FOUR, backend))
    expected = {"triton": "attention_varlen", "pytorch": "attention_reference"}[backend]
    assert called == [expected]


def test_two_threads_with_two_models_do_not_disturb_each_other() -> None:
    # One thread's model is padded and dense, the other's sparse.
    modules = [Attention(), sparse(TWO_OF_FOUR)]
    masks = [LEFT_PADDING.bool()[:, None, None].expand(-1, 1, L, -1) & triangle(), None]
    expected = [call(m, mask=mask) for m, mask in zip(modules, masks, strict=True)]
    wrong: list[int] = []
    start = threading.Barrier(2)

    def work(index: int) -> None:
        start.wait()
        for _ in range(30):
            if not torch.equal(call(modules[index], mask=masks[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

"""A tiny Llama whose attention is peaked, so that prompts of 300 tokens really skip tiles."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

import modelopt_sparse as mtsa
from modelopt_sparse.integrations import module_call

TOPICS, WORDS, LENGTH = 8, 8, 300
ATTENTION = ("model.layers.0.self_attn", "model.layers.1.self_attn")


def config_of(method: str, **fields: Any) -> dict[str, Any]:
    """A configuration that gives every module one method."""
    return {"sparse_cfg": {"*": {"method": method, **fields}}}


SKIP = config_of(
    "triton_skip_softmax", skip_softmax_threshold=0.1, skip_softmax_decode_threshold=0.1
)
FLASH = config_of(
    "flash_skip_softmax", thresholds={"prefill": [0.1, 0.01], "decode": [0.1]}, br=16, bc=16
)
NM = config_of("triton_sparse_softmax", dense_window_size=16)


def tiny_config(**changes: Any) -> LlamaConfig:
    """Two layers, two query heads on one key head."""
    return LlamaConfig(
        **{
            "vocab_size": TOPICS * WORDS,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "pad_token_id": 0,
            "eos_token_id": None,
            **changes,
        }
    )


def tiny_llama(
    attention: str = "sdpa", config: LlamaConfig | None = None, **changes: Any
) -> LlamaForCausalLM:
    """A model in eval mode, the same weights each time.

    Words of a topic have similar embeddings, and queries have the projection of the keys: a token
    attends to its own topic.
    """
    torch.manual_seed(0)
    config = config or tiny_config(**changes)
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()
    model.generation_config.eos_token_id = None
    heads, size = config.num_attention_heads, config.hidden_size
    with torch.no_grad():
        topics = torch.randn(TOPICS, size).repeat_interleave(WORDS, 0)
        model.model.embed_tokens.weight.copy_(topics + 0.5 * torch.randn(TOPICS * WORDS, size))
        for layer in model.model.layers:
            key = 0.6 * torch.randn(config.head_dim, size)
            layer.self_attn.k_proj.weight.copy_(key.repeat(config.num_key_value_heads, 1))
            layer.self_attn.q_proj.weight.copy_(key.repeat(heads, 1))
            layer.self_attn.v_proj.weight.normal_(std=0.3)
            layer.self_attn.o_proj.weight.normal_(std=0.3)
        if not config.tie_word_embeddings:
            model.lm_head.weight.normal_(std=0.3)
    return model


def prompt(length: int = LENGTH, batch: int = 1, seed: int = 0) -> Tensor:
    """Tokens in runs of 128 about one topic each."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(TOPICS, generator=generator) for _ in range(batch)])
    topics = order.repeat_interleave(128, 1)[:, :length]
    return topics * WORDS + torch.randint(0, WORDS, topics.shape, generator=generator)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    """What the model computes for `ids`, by default `prompt()`."""
    return model(prompt() if ids is None else ids).logits


def generate(model: Any, tokens: int = 4) -> Tensor:
    """The logits of greedy decoding after `prompt()`."""
    out = model.generate(
        prompt(),
        attention_mask=torch.ones_like(prompt()),
        max_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits)


def skipped(model: nn.Module, phase: str = "prefill") -> dict[str, int]:
    """Tiles that each module skipped in a phase since the last reset."""
    return {
        name: sum(entry[phase]["skipped"]) if entry[phase] else 0
        for name, entry in mtsa.get_stats(model).items()
    }


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit."""
    return torch.equal(a, b)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What `unsparsify` and a failed conversion give back: compare two with ==."""
    return {
        "modules": {
            name: (type(module), {key: id(value) for key, value in module.__dict__.items()})
            for name, module in model.named_modules()
        },
        "tensors": {key: id(value) for key, value in model.state_dict(keep_vars=True).items()},
        "values": {key: value.tolist() for key, value in model.state_dict().items()},
        "configs": {
            (name, key): (id(value), copy.deepcopy(value.__dict__))
            for name, module in model.named_modules()
            for key, value in module.__dict__.items()
            if isinstance(value, PretrainedConfig)
        },
    }


class KernelCalls(list[Any]):
    """The plans that reached the kernel boundary, call by call, and which implementation was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entries: list[str] = []
        for name in ("attention_varlen", "attention_reference"):
            function = getattr(module_call, name)
            monkeypatch.setattr(module_call, name, self._recording(name, function))

    def _recording(self, name: str, function: Any) -> Any:
        def recording(*args: Any, **kwargs: Any) -> Any:
            self.append(kwargs["plan"])
            self.entries.append(name)
            return function(*args, **kwargs)

        return recording

"""A random model of a Llama's shape, a full static cache for it, and steps as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from .case import Setting

T = TypeVar("T")

WARM_UPS = 3
PROJECTED = 1.28
"""Standard deviation of a normed hidden state's projection: a Llama's of 4096 channels."""


@dataclass(frozen=True)
class Size:
    """A Llama's, but for its heads: by default that of Llama 3.1 8B."""

    layers: int = 32
    intermediate: int = 14336
    vocabulary: int = 128256


def random_llama(length: int, size: Size, setting: Setting) -> Any:
    """The model, its weights drawn from a seed.

    Args:
        length: tokens that it may see.
    """
    shape = setting.shape
    hidden = shape.q_heads * shape.head_dim
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=hidden,
        initializer_range=PROJECTED / hidden**0.5,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=shape.q_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )
    # transformers' types say too little.
    llama = cast(Any, LlamaForCausalLM)
    with torch.device(setting.device):
        return llama._from_config(config, dtype=setting.dtype).eval()


@torch.no_grad()
def cache_of(model: Any, length: int) -> tuple[Any, Tensor]:
    """A static cache to be filled, and how many tokens each layer's holds, to be set before each step.

    Returns:
        The cache, and int64 [layers]: one tensor, so that one kernel sets them all.
    """
    cache = cast(Any, StaticCache)(config=model.config, max_cache_len=length)
    model(
        torch.ones(1, 1, dtype=torch.int64, device=model.device), past_key_values=cache
    )  # allocates
    filled = torch.zeros(len(cache.layers), dtype=torch.int64, device=model.device)
    for index, layer in enumerate(cache.layers):
        layer.cumulative_length = filled[index]
    return cache, filled


def flops_of(model: Any, rows: int, length: int) -> float:
    """Multiplications and additions of products: the last `rows` of `length` tokens, and one's logits."""
    config = model.config
    head: int = model.lm_head.weight.numel()
    weights = sum(x.numel() for x in model.parameters()) - head
    weights -= model.get_input_embeddings().weight.numel()
    pairs = rows * (length - rows) + rows * (rows + 1) / 2
    scores = config.num_hidden_layers * config.num_attention_heads * pairs
    total: float = 2.0 * (rows * weights + head) + 4.0 * scores * config.head_dim
    return total


def captured(run: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """`run` as a CUDA graph, which returns the same tensors each time; on a CPU `run` itself.

    A graph knows addresses alone: what is returned keeps `run` alive, and with it the tensors that it reads.
    """
    if device.type != "cuda":
        return run
    # It ships no types.
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()

    def replay(reads: Callable[[], T]) -> T:
        graph.replay()
        return found

    return partial(replay, run)

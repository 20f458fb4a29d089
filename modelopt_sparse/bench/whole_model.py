"""A whole model, sparsified, beside itself with transformers' attention: the first token, and each next one.

Random weights attend to everything alike, and nothing could be skipped. So tokens have topics, which lie in
channels of their embeddings that projections of queries and keys read: each attends to its own topic.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from modelopt_sparse.integrations.hf import ATTENTION_NAME
from modelopt_sparse.report import get_stats, reset_stats
from modelopt_sparse.sparse_mode import (
    disable_sparse_attention,
    enable_sparse_attention,
    sparsify,
)

from .baselines import Peer
from .case import OWN_DENSE, Case, Check, Setting, Trial, tokens
from .checks import relative_error
from .decode_step import LOGITS_ERROR, TRANSFORMERS
from .llama import Size, cache_of, captured, flops_of, random_llama

TOPICS = 4
SEGMENT = 512
"""Tokens of one topic in a row: several tiles."""
SHARED_SCORE = 12.0
"""Scores of a query and a key that have a topic in common; of others about 0."""
THRESHOLD = 0.01
SIZE = 20.0
"""Root mean square of an embedding: what layers add shows in the logits, and doesn't hide the topic."""
NOISE = 0.3
"""What is left of the random part of queries and keys."""
LEAST_SHARE, MOST_SHARE = 0.6, 1.05
"""Of the tiles of other topics, how many fall: those visited first stay, and those of two topics."""


class Prompted:
    """A model, and a prompt of topics that take turns.

    Args:
        length: tokens of the prompt. topics: at most one for each pair of channels that rotates slowly.
    """

    def __init__(self, length: int, topics: int, size: Size, setting: Setting) -> None:
        self.model = random_llama(length, size, setting)
        _teach_topics(self.model, topics)
        position = torch.arange(length, device=setting.device)
        drawn = torch.randint(size.vocabulary // topics, (length,), device=setting.device)
        self.tokens = (drawn * topics + position // SEGMENT % topics)[None]
        method = {
            "method": "triton_skip_softmax",
            "skip_softmax_threshold": THRESHOLD,
            "skip_softmax_decode_threshold": THRESHOLD,
        }
        sparsify(self.model, {"sparse_cfg": {"*": method}})

    @torch.no_grad()
    def run(self, attention: str, is_sparse: bool = True, **inputs: Any) -> Any:
        """What the model returns of some inputs, with an attention; ours may be sparse or dense."""
        self.model.set_attn_implementation(attention)
        (enable_sparse_attention if is_sparse else disable_sparse_attention)(self.model)
        return self.model(**inputs)

    def first_logits(self, attention: str, is_sparse: bool = True) -> Tensor:
        """Of the token after the prompt: [vocabulary]."""
        found = self.run(attention, is_sparse, input_ids=self.tokens, logits_to_keep=1)
        out: Tensor = found.logits[0, -1]
        return out

    def share(self, phase: str) -> float:
        """Tiles skipped since the last reset."""
        counts = [each[phase] for each in get_stats(self.model).values()]
        skipped, visible = (
            sum(int(sum(c[name])) for c in counts) for name in ("skipped", "visible")
        )
        return skipped / visible


@torch.no_grad()
def _teach_topics(model: Any, topics: int) -> None:
    """Token t has topic t % topics, and queries and keys the topic of their token."""
    config, embedding = model.config, model.get_input_embeddings().weight
    device, hidden = embedding.device, config.hidden_size
    noise = torch.randn(hidden, topics, device=device)
    direction = torch.linalg.qr(noise).Q.T  # [topics, hidden]
    embedding.div_(embedding.float().norm(dim=1, keepdim=True))
    embedding.add_(direction[torch.arange(len(embedding), device=device) % topics])
    embedding.mul_(SIZE * (hidden / 2) ** 0.5)
    # A normed embedding has half of its square along its topic.
    gain = (SHARED_SCORE * config.head_dim**0.5) ** 0.5 / (hidden / 2) ** 0.5
    # The pairs of channels that rotate the least, one a topic.
    channel = config.head_dim // 2 - 1 - torch.arange(topics, device=device)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            weight = projection.weight.mul_(NOISE).view(-1, config.head_dim, hidden)
            weight[:, channel] += (gain * direction).to(weight.dtype)


def first_token(length: int, topics: int, size: Size, setting: Setting) -> Trial:
    """From the prompt to the logits of the next token, not captured, as a user calls the model."""
    prompted = Prompted(length, topics, size, setting)
    ours = partial(prompted.first_logits, ATTENTION_NAME)
    own, theirs = partial(ours, is_sparse=False), partial(prompted.first_logits, "sdpa")
    expected = theirs()
    reset_stats(prompted.model)
    error = relative_error(ours(), expected)
    share = prompted.share("prefill")
    return Trial(
        lambda logits: relative_error(logits, expected),
        ours,
        lambda: Check(error, LOGITS_ERROR, _misdialled(share, topics)),
        {
            TRANSFORMERS: lambda: Peer(theirs, theirs),
            OWN_DENSE: lambda: Peer(own, own, is_rival=False),
        },
        flops_of(prompted.model, length, length),
        share,
    )


def next_token(length: int, topics: int, size: Size, setting: Setting) -> Trial:
    """A decode step over a full static cache, in a CUDA graph."""
    prompted = Prompted(length, topics, size, setting)
    model = prompted.model
    cache, filled = cache_of(model, length)
    prefilled = prompted.run("sdpa", input_ids=prompted.tokens, logits_to_keep=1)
    expected = prefilled.logits[0, -1]
    for layer, of_prompt in zip(cache.layers, prefilled.past_key_values.layers, strict=True):
        layer.keys.copy_(of_prompt.keys)
        layer.values.copy_(of_prompt.values)
    del prefilled
    token = prompted.tokens[:, -1:]

    def step(attention: str, is_sparse: bool = True) -> Tensor:
        filled.fill_(length - 1)
        found = prompted.run(attention, is_sparse, input_ids=token, past_key_values=cache)
        out: Tensor = found.logits[0, -1]
        return out

    reset_stats(model)
    step(ATTENTION_NAME)
    share = prompted.share("decode")
    ours, own, theirs = (
        captured(partial(step, *how), setting.device)
        for how in ((ATTENTION_NAME,), (ATTENTION_NAME, False), ("sdpa",))
    )

    def error(logits: Tensor) -> float:
        return relative_error(logits, expected)

    return Trial(
        error,
        ours,
        lambda: Check(error(ours()), LOGITS_ERROR, _misdialled(share, topics)),
        {
            TRANSFORMERS: lambda: Peer(theirs, theirs),
            OWN_DENSE: lambda: Peer(own, own, is_rival=False),
        },
        flops_of(model, 1, length),
        share,
    )


def _misdialled(share: float, topics: int) -> str:
    others = 1 - 1 / topics
    if LEAST_SHARE * others <= share <= MOST_SHARE * others:
        return ""
    return f"skipped {share:.1%} of tiles, and {others:.0%} are of other topics"


def whole_model_cases() -> list[Case]:
    """Llama 3.1 8B's shape: bf16, 32 query and 8 KV heads, head_dim 128, one sequence."""
    return [
        Case("model", f"{name}-{tokens(n)}", partial(build, n, TOPICS, Size()))
        for n in (8192, 32768, 131072)
        for name, build in (("first-token", first_token), ("next-token", next_token))
    ]


def small_whole_model_cases() -> list[Case]:
    """The same, small."""
    size, topics = Size(2, 48, 100), 2
    return [
        Case("model", "first-token-3k", partial(first_token, 3072, topics, size)),
        Case("model", "next-token-3k", partial(next_token, 3072, topics, size)),
    ]

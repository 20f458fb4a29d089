"""One decode step of a whole model in a CUDA graph, beside the same with transformers' own attention."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from modelopt_sparse.integrations.hf import ATTENTION_NAME, register
from modelopt_sparse.integrations.masks import interval_mask
from modelopt_sparse.integrations.packing import PackedBatch, Visibility, pack
from modelopt_sparse.kernels import attention_varlen

from .baselines import Peer
from .case import Case, Check, Setting, Trial
from .checks import DENSE_ERROR, relative_error
from .llama import PROJECTED, Size, cache_of, captured, flops_of, random_llama
from .timing import Times

TRANSFORMERS, ALONE = "transformers' sdpa", "attention alone"
LOGITS_ERROR = 0.05
"""Relative L2 error of logits: 0.014 for 32 layers in bf16, and 0.14 where 1 in 64 keys is left out."""
SCORE = 0.5
"""Standard deviation of scores: low, or rounding grows from layer to layer."""


class Step:
    """A random model, and a static cache that lacks one token of being full: the one that is decoded.

    Args:
        length: tokens that attention sees.
    """

    def __init__(self, length: int, size: Size, setting: Setting) -> None:
        register()
        device = setting.device
        self.model = random_llama(length, size, setting)
        self.setting, self.length, self.size = setting, length, size
        self.token = torch.ones(1, 1, dtype=torch.int64, device=device)
        self.cache, self.filled = cache_of(self.model, length)
        for layer in self.cache.layers:
            layer.keys.normal_(std=SCORE / PROJECTED)
            # As many as attention averages, so that a few keys more or less show in the logits.
            layer.values.normal_(std=(length / math.exp(SCORE**2)) ** 0.5)

    @torch.no_grad()
    def logits(self, attention: str) -> Tensor:
        """Decodes the last token: [vocabulary]."""
        self.model.set_attn_implementation(attention)
        self.filled.fill_(self.length - 1)
        out: Tensor = self.model(self.token, past_key_values=self.cache).logits
        return out[0, -1]

    def packed(self) -> list[PackedBatch]:
        """What attention of each layer hands to the kernels, but for the values of the queries."""
        shape, device = self.setting.shape, self.setting.device
        offset = torch.full((), self.length - 1, device=device)
        mask = interval_mask(
            batch_size=1,
            q_length=1,
            kv_length=self.length,
            q_offset=offset,
            allow_is_causal_skip=False,
            device=device,
            config=self.model.config,
        )
        query = torch.randn(1, shape.q_heads, 1, shape.head_dim, device=device)
        query = query.to(self.setting.dtype)
        return [
            pack(query, layer.keys, layer.values, Visibility(mask)) for layer in self.cache.layers
        ]


def decode_step(length: int, size: Size, setting: Setting) -> Trial:
    """A step with our attention, beside one with transformers' own, and our kernels alone."""
    step = Step(length, size, setting)
    packed = step.packed()
    ours = captured(partial(step.logits, ATTENTION_NAME), setting.device)
    theirs = captured(partial(step.logits, "sdpa"), setting.device)
    alone = captured(partial(_attend, packed), setting.device)
    expected = theirs().clone()

    def error(logits: Tensor) -> float:
        return relative_error(logits, expected)

    def check() -> Check:
        off = max(relative_error(*pair) for pair in zip(alone(), map(_exact, packed), strict=True))
        wrong = "" if off <= DENSE_ERROR else f"attention alone is off by {off:.3f}"
        return Check(error(ours()), LOGITS_ERROR, wrong)

    def outside(step: Times, alone: Times) -> str:
        return f"{1000 * (step.median - alone.median) / size.layers:.1f} us a layer outside of it"

    peers = {
        TRANSFORMERS: lambda: Peer(theirs, theirs),
        ALONE: lambda: Peer(alone, compare=outside, is_rival=False),
    }
    return Trial(error, ours, check, peers, flops_of(step.model, 1, length))


@torch.no_grad()
def _attend(packed: list[PackedBatch]) -> list[Tensor]:
    """Attention of all layers, one after the other: [1, Hq, D] each."""
    return [attention_varlen(x.q, x.k, x.v, x.seqs, bounds=x.bounds).out for x in packed]


def _exact(packed: PackedBatch) -> Tensor:
    """The same of one layer in fp32: [1, Hq, D]."""
    q, k, v = packed.q.float(), packed.k.float(), packed.v.float()
    grouped = q[0].view(k.shape[1], -1, q.shape[-1])  # [Hk, g, D]
    scores = torch.einsum("hgd,nhd->hgn", grouped, k) * q.shape[-1] ** -0.5
    return torch.einsum("hgn,nhd->hgd", scores.softmax(-1), v).reshape(q.shape)


def step_cases() -> list[Case]:
    """Llama 3.1 8B's shape: bf16, 32 query and 8 KV heads, head_dim 128, one sequence."""
    return [Case("step", "step-32k", partial(decode_step, 32 * 1024, Size()))]


def small_step_cases() -> list[Case]:
    """The same, small."""
    return [Case("step", "step-300", partial(decode_step, 300, Size(2, 48, 100)))]

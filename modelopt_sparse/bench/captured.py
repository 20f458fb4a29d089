"""Queries, keys and values as a trained model makes them of a text: nothing about them is dialled.

All layers are sequences of one call, so that a small model fills a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from modelopt_sparse.errors import ArgumentError, describe
from modelopt_sparse.files import read_text
from modelopt_sparse.kernels import Plan, SkipSoftmax

from . import baselines
from .case import FLASH, OWN_DENSE, SDPA, Case, Check, Setting, Trial, tokens
from .cases import forward, own_dense, skipped_share, timed_forward
from .checks import forward_error, relative_error
from .inputs import Inputs

CAPTURE = "modelopt_capture"
CAPTURED_ERROR = 0.01
"""Relative L2 error of sampled rows: scores of a trained model are larger than drawn ones, and round more."""
LAMBDAS = (0.01, 0.1, 0.5)
LENGTHS = (4096, 8192, 16384)


@dataclass(frozen=True)
class Source:
    """A checkpoint with its tokenizer, and a file to read."""

    model: Path
    text: Path


def capture(source: Source, length: int, setting: Setting) -> Inputs:
    """What each layer's attention is given for the first tokens of the text, a sequence a layer.

    Raises:
        ArgumentError: the text is shorter, or not UTF-8.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(source.model, local_files_only=True)
    ids = tokenizer(read_text(source.text, "--text", ArgumentError), return_tensors="pt").input_ids[
        :, :length
    ]
    if ids.shape[1] < length:
        raise ArgumentError(describe("text", f"{ids.shape[1]} tokens", f"at least {length}"))
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
    ) -> Any:
        found.append((query, key, value))
        return sdpa_attention_forward(module, query, key, value, *rest, **options)

    AttentionInterface.register(CAPTURE, attend)
    AttentionMaskInterface.register(CAPTURE, sdpa_mask)
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.model, attn_implementation=CAPTURE, dtype=setting.dtype, local_files_only=True
    )
    model.to(setting.device)
    with torch.no_grad():
        model(ids.to(setting.device), use_cache=False, logits_to_keep=1)
    q, k, v = (torch.cat([x[0].transpose(0, 1) for x in of]) for of in zip(*found, strict=True))
    layers = len(found)
    found.clear()  # transformers keeps the function, and it keeps them
    return Inputs(q, k, v, (length,) * layers)


def captured_skip(source: Source, length: int, threshold: float, setting: Setting) -> Trial:
    """Forward with a threshold over what a model attends to; beside it the error that this makes."""
    inputs = capture(source, length, setting)
    plan = Plan(skip=SkipSoftmax(threshold))

    output = forward(inputs, plan, details=True)
    distance = relative_error(output.out, forward(inputs).out)
    note = f"skipping is {distance:.4f} away from it"
    peers = {OWN_DENSE: lambda: replace(own_dense(inputs), note=note)}
    if setting.device.type == "cuda":
        peers[FLASH] = partial(baselines.flash_varlen, inputs)
    else:
        peers[SDPA] = partial(baselines.sdpa, inputs, None)
    return Trial(
        partial(forward_error, inputs),
        timed_forward(inputs, plan),
        lambda: Check(forward_error(inputs, output.out, output.kept), CAPTURED_ERROR),
        peers,
        inputs.flops(),
        skipped_share(output),
    )


def captured_cases(source: Source, lengths: Sequence[int] = LENGTHS) -> list[Case]:
    """Each length at each lambda."""
    return [
        Case("captured", f"captured-{tokens(n)}-lambda{x:g}", partial(captured_skip, source, n, x))
        for n in lengths
        for x in LAMBDAS
    ]

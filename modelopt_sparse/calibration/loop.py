"""Running a model on what it is calibrated with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from modelopt_sparse.config.calibration import CalibrationConfig
from modelopt_sparse.errors import ArgumentError, UnsupportedModel, describe
from modelopt_sparse.modes.apply import check_eval_mode

from .batches import sequences, token_ids


def run_prompts(model: nn.Module, batches: Iterable[Any], config: CalibrationConfig) -> None:
    """Gives each batch to the model, in chunks if there is a chunk size, and lets it write some tokens.

    Sequences of a batch with padding run one by one, without it: positions and what is written are then
    those of the sequence, wherever the padding is.

    Args:
        batches: each as `sequences` takes it.

    Raises:
        ArgumentTypeError, ArgumentError: as `sequences`; the model is in training mode, or computes NaN.
        UnsupportedModel: it has no logits or no cache, or an encoder.
    """
    check_eval_mode(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise _unsupported(f"a {type(model).__name__}, which has an encoder and a decoder")
    device = device_of(model)
    for batch in batches:
        ids = token_ids(batch, device)
        for whole in sequences(batch, device) if ids is None else (ids,):
            _run(model, whole, config)


def device_of(model: nn.Module) -> torch.device:
    """Where the model takes its inputs. Weights that wait elsewhere, on "meta", aren't asked."""
    found = (weight.device for weight in model.parameters() if weight.device.type != "meta")
    return next(found, torch.device("cpu"))


def _run(model: nn.Module, ids: Tensor, config: CalibrationConfig) -> None:
    cache = DynamicCache(config=getattr(model, "config", None))
    # Of a sequence's own, so that what is written after it doesn't depend on the others of its batch.
    generators = [torch.Generator().manual_seed(int(total)) for total in ids.sum(1)]
    logits = torch.empty(0)

    def step(given: Tensor) -> Tensor:
        # Of all logits only the last are looked at.
        found = model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for part in ("logits", "past_key_values"):
            if getattr(found, part, None) is None:
                raise _unsupported(f"a {type(model).__name__} that returns no {part}")
        last: Tensor = found.logits[:, -1]
        return last

    for chunk in torch.split(ids, config.chunk_size or ids.shape[1], dim=1):
        logits = step(chunk)
    for _ in range(config.num_decode_tokens):
        logits = step(_drawn(logits, generators).to(ids.device))


def _drawn(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """A token of each row, as likely as the model says: logits [B, V], int64 [B, 1] on the CPU.

    The likeliest ones would soon repeat themselves where a model is small: what a prompt's share is then says
    little of the next one's.
    """
    likely = logits.cpu().float().softmax(-1)
    if likely.isnan().any():
        remedy = "Load it in bfloat16 or float32."
        raise ArgumentError(describe("the model's logits", "NaN", "numbers", remedy))
    rows = zip(likely, generators, strict=True)
    return torch.stack([torch.multinomial(row, 1, generator=own) for row, own in rows])


def _unsupported(got: str) -> UnsupportedModel:
    remedy = "Give a function that runs it as forward_loop."
    takes = "a causal language model with logits and a cache"
    return UnsupportedModel(describe("model", got, takes, remedy))

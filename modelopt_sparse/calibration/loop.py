"""Running a model on what it is calibrated with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from modelopt_sparse.config.calibration import CalibrationConfig
from modelopt_sparse.errors import ArgumentTypeError, describe


def run_prompts(model: nn.Module, batches: Iterable[Any], config: CalibrationConfig) -> None:
    """Gives each batch to the model, in chunks if there is a chunk size, and lets it write some tokens.

    Sequences of a batch with padding run one by one, without it: positions and what is written are then
    those of the sequence, wherever the padding is.

    Args:
        batches: token ids [B, n], or mappings with ``input_ids`` and, where there is padding, an
            ``attention_mask`` [B, n].

    Raises:
        ArgumentTypeError: a batch is something else.
    """
    device = next(model.parameters()).device
    for batch in batches:
        ids, mask = _ids_and_mask(batch, device)
        is_padded = mask is not None and not mask.all()
        for whole in sequences(batch, device) if is_padded else (ids,):
            _run(model, whole, config)


def sequences(batch: Any, device: torch.device) -> Iterator[Tensor]:
    """Token ids [1, n] of each sequence of a batch, without its padding.

    Raises:
        ArgumentTypeError: as `run_prompts`.
    """
    ids, mask = _ids_and_mask(batch, device)
    for index, row in enumerate(ids):
        yield (row if mask is None else row[mask[index].bool()])[None]


def _run(model: nn.Module, ids: Tensor, config: CalibrationConfig) -> None:
    cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
    # Of a sequence's own, so that what is written after it doesn't depend on the others of its batch.
    generators = [torch.Generator().manual_seed(int(total)) for total in ids.sum(1)]
    logits = torch.empty(0)

    def step(given: Tensor) -> Tensor:
        # Of all logits only the last are looked at.
        found: Tensor = model(given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return found[:, -1]

    for chunk in torch.split(ids, config.chunk_size or ids.shape[1], dim=1):
        logits = step(chunk)
    for _ in range(config.num_decode_tokens):
        logits = step(_drawn(logits, generators).to(ids.device))


def _drawn(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """A token of each row, as likely as the model says: logits [B, V], int64 [B, 1] on the CPU.

    The likeliest ones would soon repeat themselves where a model is small: what a prompt's share is then says
    little of the next one's.
    """
    rows = zip(logits.cpu().float().softmax(-1), generators, strict=True)
    return torch.stack([torch.multinomial(row, 1, generator=own) for row, own in rows])


def _ids_and_mask(batch: Any, device: torch.device) -> tuple[Tensor, Tensor | None]:
    ids, mask = (
        (batch.get("input_ids"), batch.get("attention_mask"))
        if isinstance(batch, Mapping)
        else (batch, None)
    )
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else repr(batch)[:100]
        takes = "token ids [batch, tokens], not empty, or a mapping with them as input_ids"
        raise ArgumentTypeError(describe("a batch to calibrate with", got, takes))
    return ids.to(device), None if mask is None else mask.to(device)

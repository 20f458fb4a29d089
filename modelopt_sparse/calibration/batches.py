"""The token ids that a user hands over to calibrate with, sequence by sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from modelopt_sparse.errors import ArgumentError, ArgumentTypeError, describe

_TAKES = "token ids, [tokens] or [batch, tokens], not empty, or a mapping with them as input_ids"
# What else is in a mapping would change what the model computes.
_KEYS = ("input_ids", "attention_mask", "labels")

Batches = Iterable[Any] | Dataset[Any]
"""Batches to go through, or rows to index: what each may be, `sequences` says."""


def batches_of(name: str, data: Batches) -> Iterable[Any]:
    """Batches one by one, of an iterable or of a dataset that is only indexed.

    Raises:
        ArgumentTypeError: it is neither, or a single batch.
    """
    is_one = isinstance(data, Tensor | Mapping | str)
    if isinstance(data, Iterable) and not is_one:
        return data
    if isinstance(data, Sized) and hasattr(data, "__getitem__") and not is_one:
        return (data[index] for index in range(len(data)))
    takes = "an iterable of batches, or a dataset"
    remedy = "Put a single batch in a list." if is_one else ""
    raise ArgumentTypeError(describe(name, repr(data)[:100], takes, remedy))


def token_ids(batch: object, device: torch.device) -> Tensor | None:
    """Token ids [B, n] of a batch without padding; None where it has some."""
    ids, mask = _ids_and_mask(batch)
    return ids.to(device) if mask is None or mask.all() else None


def sequences(batch: object, device: torch.device) -> Iterator[Tensor]:
    """Token ids [1, n] of each sequence of a batch, without its padding.

    Args:
        batch: token ids [n] or [B, n], as a tensor or lists of integers; or a mapping with these as
            ``input_ids`` and, where there is padding, an ``attention_mask`` of their shape. ``labels``
            aren't looked at.
    Raises:
        ArgumentTypeError: a batch is something else, or has more.
        ArgumentError: the mask has another shape, or a sequence has no token.
    """
    ids, mask = _ids_and_mask(batch)
    for index, row in enumerate(ids):
        own = row if mask is None else row[mask[index]]
        if not own.numel():
            got, takes = "a sequence of padding alone", "at least one token in each"
            raise ArgumentError(describe("attention_mask", got, takes))
        yield own[None].to(device)


def _ids_and_mask(batch: object) -> tuple[Tensor, Tensor | None]:
    given = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    if others := [key for key in given if key not in _KEYS]:
        remedy = "Leave them out, or give a function that runs the model on them."
        got = ", ".join(map(str, others))
        raise ArgumentTypeError(describe("a batch's keys", got, ", ".join(_KEYS), remedy))
    ids = _rows(given.get("input_ids"))
    if ids is None or not ids.numel() or ids.dtype == torch.bool:
        got = f"{ids.dtype} {tuple(ids.shape)}" if ids is not None else repr(batch)[:100]
        raise ArgumentTypeError(describe("a batch to calibrate with", got, _TAKES))
    if given.get("attention_mask") is None:
        return ids.long(), None
    mask = _rows(given["attention_mask"])
    if mask is None or mask.shape != ids.shape:
        got = repr(given["attention_mask"])[:100] if mask is None else f"shape {tuple(mask.shape)}"
        takes = f"{tuple(ids.shape)}, 0 where there is padding"
        raise ArgumentError(describe("attention_mask", got, takes))
    return ids.long(), mask != 0


def _rows(values: object) -> Tensor | None:
    """Integers as [B, n]; None if they aren't that."""
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    found = found[None] if found.ndim == 1 else found
    return None if found.ndim != 2 or found.is_floating_point() else found

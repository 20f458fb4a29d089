"""The batches that a user hands over, checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modelopt_sparse.errors import ArgumentError, ArgumentTypeError, UnsupportedCall, describe

# What `compare` gives to each call itself.
_GIVEN = "past_key_values", "use_cache", "return_dict"


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences that run together.

    Args:
        ids: int [B, T], token ids.
        scored: bool [B, T - 1]: token t is one of the text, and so is the one after it, which t predicts.
        arguments: those of the model's forward.
    """

    ids: Tensor
    scored: Tensor
    arguments: dict[str, Any]

    @classmethod
    def of(cls, name: str, batch: object) -> Batch:
        """A tensor of ids or a mapping of forward arguments, as a batch.

        Args:
            name: what messages call it.
        Raises:
            ArgumentTypeError, ArgumentError: it is no such thing, or a sequence has less than two tokens.
            UnsupportedCall: it has arguments that `compare` gives itself. A cache is one: the first of two
                passes would change it for the second.
        """
        if isinstance(batch, Tensor):
            batch = {"input_ids": batch}
        if not isinstance(batch, Mapping):
            takes = "token ids [B, T], or a mapping of forward arguments with input_ids"
            raise ArgumentTypeError(describe(name, f"a {type(batch).__name__}", takes))
        arguments = dict(batch)
        given = [key for key in _GIVEN if key in arguments]
        if given:
            takes = "no argument that compare gives itself"
            raise UnsupportedCall(describe(name, ", ".join(given), takes, "Leave it out."))
        ids = _ids(f"{name}.input_ids", arguments.get("input_ids"))
        text = _text(f"{name}.attention_mask", arguments.get("attention_mask"), ids)
        scored = text[:, :-1] & text[:, 1:]
        if not scored.any(1).all():
            takes = "at least two tokens in a row in each sequence: one predicts the next"
            raise ArgumentError(describe(name, "a sequence of less than two tokens", takes))
        return cls(ids, scored, arguments)

    def decoded(self, name: str, count: int) -> Batch:
        """The same, of which only what the last `count` tokens predict is scored.

        Raises:
            ArgumentError: a sequence hasn't so many tokens and one before them, or ends in padding.
            UnsupportedCall: there are arguments that don't say which of them belong to a token.
        """
        others = [key for key in self.arguments if key not in ("input_ids", "attention_mask")]
        if others:
            takes = "input_ids and attention_mask alone, where tokens are decoded"
            raise UnsupportedCall(describe(name, ", ".join(others), takes))
        if not self.scored[:, -count:].all() or self.scored.shape[1] < count:
            takes = f"sequences that end with {count + 1} tokens of text"
            remedy = "Pad on the left, or decode fewer."
            raise ArgumentError(describe(name, "shorter ones, or padding behind", takes, remedy))
        scored = self.scored.clone()
        scored[:, : scored.shape[1] - count + 1] = False
        return replace(self, scored=scored)

    def calls(self, decoded: int) -> Iterator[dict[str, Any]]:
        """The arguments of each call, where the last `decoded` tokens come one by one."""
        if not decoded:
            yield self.arguments
            return
        mask = self.arguments.get("attention_mask")
        start, length = 0, self.ids.shape[1]
        for end in range(length - decoded, length + 1):
            seen = None if mask is None else mask[:, :end]
            yield {"input_ids": self.ids[:, start:end], "attention_mask": seen}
            start = end


def _ids(name: str, ids: object) -> Tensor:
    takes = "an int64 or int32 tensor [B, T]"
    if not isinstance(ids, Tensor):
        got = "None" if ids is None else f"a {type(ids).__name__}"
        remedy = 'Tokenizers return it with return_tensors="pt".'
        raise ArgumentTypeError(describe(name, got, takes, remedy))
    if ids.dim() != 2 or not ids.numel() or ids.dtype not in (torch.int64, torch.int32):
        got = f"{ids.dtype} {list(ids.shape)}"
        raise ArgumentError(describe(name, got, f"{takes}, not empty"))
    return ids


def _text(name: str, mask: object, ids: Tensor) -> Tensor:
    """Bool [B, T], False where there is padding."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(mask, Tensor):
        takes = "a tensor or None"
        raise ArgumentTypeError(describe(name, f"a {type(mask).__name__}", takes))
    if mask.shape != ids.shape:
        takes = f"{list(ids.shape)}, 0 where there is padding"
        raise ArgumentError(describe(name, f"shape {list(mask.shape)}", takes))
    return mask != 0

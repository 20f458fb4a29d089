"""Windows of a text, in tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .loading import find_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def text_windows(
    name: str, model: PreTrainedModel, words: str, length: int, count: int
) -> list[Tensor]:
    """`count` windows of `length` + 1 tokens on the model's device, evenly over the text: [1, length + 1].

    Raises:
        ArgumentError: the model takes fewer tokens, has no tokenizer, or the text is too short.
    """
    from modelopt_sparse.errors import ArgumentError, describe

    check_length(model, length)
    tokenizer = find_tokenizer(name)
    if tokenizer is None:
        raise ArgumentError(describe("MODEL", f"{name!r}, without a tokenizer", "one with it"))
    tokens = tokenizer(words, return_tensors="pt", verbose=False)["input_ids"]
    spare = tokens.shape[1] - (length + 1)
    if spare < 0:
        remedy = "Give a longer --text, or a smaller --length."
        got, takes = f"a text of {tokens.shape[1]} tokens", f"at least {length + 1}"
        raise ArgumentError(describe("--text", got, takes, remedy))
    starts = [spare * index // max(count - 1, 1) for index in range(count)]
    return [tokens[:, start : start + length + 1].to(model.device) for start in starts]


def check_length(model: PreTrainedModel, length: int) -> None:
    """Raises ArgumentError where the model takes fewer tokens."""
    from modelopt_sparse.calibration.prompts import context_of
    from modelopt_sparse.errors import ArgumentError, describe

    context = context_of(model)
    if context is not None and length > context:
        raise ArgumentError(describe("--length", length, f"at most {context} for this model"))

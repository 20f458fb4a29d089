"""Windows of a text, in tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .loading import find_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# A token has fewer characters, but in text that is hardly any.
_CHARACTERS = 16

S = TypeVar("S", str, list[int])


def read_words(path: Path) -> str:
    """The text of a file that ``--text`` names. Raises ArgumentError where it isn't UTF-8."""
    from modelopt_sparse.errors import ArgumentError
    from modelopt_sparse.files import read_text

    return read_text(path, "--text", ArgumentError)


def text_windows(
    name: str, model: PreTrainedModel, words: str, length: int, count: int
) -> list[Tensor]:
    """`count` windows of `length` + 1 tokens on the model's device, evenly over the text: [1, length + 1].

    They don't overlap where the text is long enough. Of a long one, parts alone are turned into tokens.

    Raises:
        ArgumentError: the model takes fewer tokens, has no tokenizer, or the text is too short.
    """
    import torch

    from modelopt_sparse.errors import ArgumentError, describe

    check_length(model, length)
    tokenizer = find_tokenizer(name)
    if tokenizer is None:
        raise ArgumentError(describe("MODEL", f"{name!r}, without a tokenizer", "one with it"))
    windows = _from_parts(tokenizer, words, length + 1, count)
    if windows is None:
        tokens = _tokens(tokenizer, words)
        if len(tokens) < length + 1:
            remedy = "Give a longer --text, or a smaller --length."
            got, takes = f"a text of {len(tokens)} tokens", f"at least {length + 1}"
            raise ArgumentError(describe("--text", got, takes, remedy))
        windows = _evenly(tokens, length + 1, count)
    return [torch.tensor([window], device=model.device) for window in windows]


def _from_parts(tokenizer: Any, words: str, size: int, count: int) -> list[list[int]] | None:
    """The windows at the beginnings of parts of the text; None where it, or what a part has, is too short."""
    part = _CHARACTERS * size
    if count * part >= len(words):
        return None
    parts = _evenly(words, part, count)
    windows = [_tokens(tokenizer, each, not index)[:size] for index, each in enumerate(parts)]
    return windows if all(len(window) == size for window in windows) else None


def _tokens(tokenizer: Any, words: str, is_first: bool = True) -> list[int]:
    """With the tokens that a text begins with, if it is the first."""
    ids: list[int] = tokenizer(words, add_special_tokens=is_first, verbose=False)["input_ids"]
    return ids


def _evenly(whole: S, size: int, count: int) -> list[S]:
    """`count` slices of `size`, the first at the beginning and the last at the end."""
    starts = [(len(whole) - size) * index // max(count - 1, 1) for index in range(count)]
    return [whole[start : start + size] for start in starts]


def check_length(model: PreTrainedModel, length: int) -> None:
    """Raises ArgumentError where the model takes fewer tokens."""
    from modelopt_sparse.calibration.prompts import context_of
    from modelopt_sparse.errors import ArgumentError, describe

    context = context_of(model)
    if context is not None and length > context:
        raise ArgumentError(describe("--length", length, f"at most {context} for this model"))

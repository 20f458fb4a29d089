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
    """`count` windows of `length` tokens on the model's device, evenly over the text: [1, length].

    Each begins with the tokens that every text begins with. None overlap: of a short text there are fewer.
    Of a long one, parts alone are turned into tokens.

    Raises:
        ArgumentError: the model takes fewer tokens, has no tokenizer, or the text is too short for one.
    """
    import torch

    from modelopt_sparse.calibration.prompts import opening_tokens
    from modelopt_sparse.errors import ArgumentError, describe

    check_length(model, length)
    tokenizer = find_tokenizer(name)
    if tokenizer is None:
        raise ArgumentError(describe("MODEL", f"{name!r}, without a tokenizer", "one with it"))
    opening = opening_tokens(tokenizer)
    size = length - len(opening)
    windows = _from_parts(tokenizer, words, size, count)
    if windows is None:
        tokens = _tokens(tokenizer, words)
        if len(tokens) < size:
            remedy = "Give a longer --text, or a smaller --length."
            got, takes = f"a text of {len(opening) + len(tokens)} tokens", f"at least {length}"
            raise ArgumentError(describe("--text", got, takes, remedy))
        windows = _evenly(tokens, size, min(count, len(tokens) // size))
    return [torch.tensor([[*opening, *window]], device=model.device) for window in windows]


def _from_parts(tokenizer: Any, words: str, size: int, count: int) -> list[list[int]] | None:
    """The beginnings of parts of the text; None where it, or what a part has, is too short."""
    part = _CHARACTERS * size
    if count * part >= len(words):
        return None
    windows = [_tokens(tokenizer, each)[:size] for each in _evenly(words, part, count)]
    return windows if all(len(window) == size for window in windows) else None


def _tokens(tokenizer: Any, words: str) -> list[int]:
    ids: list[int] = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]
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

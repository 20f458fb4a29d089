"""Prompts in tokens, of the lengths that a calibration wants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from modelopt_sparse.config.calibration import CalibrationConfig
from modelopt_sparse.errors import ConfigError, describe
from modelopt_sparse.files import read_text

from .tasks import make_task

# The shortest prompts.
LEAST = 1024
HELD_OUT = 1
"""The seed of prompts that `calibrate` doesn't make."""
# Text is turned into tokens so much at a time: some tokenizers take time that grows with its square.
_CHARACTERS = 4096
# Parts of a file begin so far apart, of its length: by the golden ratio they fall between those before. With
# another seed all are shifted, by what doesn't take one onto another.
_NEXT, _APART = 0.618, 2**0.5 - 1

_REMEDY = "Give prompts of your own as forward_loop."


def context_of(model: nn.Module) -> int | None:
    """How many tokens the model takes; None where no configuration says."""
    config: Any = getattr(model, "config", None)
    text = None if config is None else config.get_text_config()
    found: int | None = getattr(text, "max_position_embeddings", None)
    return found


def fitting(model: nn.Module, config: CalibrationConfig) -> CalibrationConfig:
    """The same, with prompts that the model has room for where nobody says how long they are to be.

    Raises:
        ConfigError: `max_seqlen` is given, and with the tokens that the model writes it is more than the
            model's configuration says that it takes.
    """
    context = context_of(model)
    if context is None or config.max_seqlen + config.num_decode_tokens <= context:
        return config
    most = context - config.num_decode_tokens
    if "max_seqlen" in config.model_fields_set:
        takes = f"at most {most} for this model, with the tokens that it writes"
        raise ConfigError(describe("calibration.max_seqlen", config.max_seqlen, takes))
    return config.model_copy(update={"max_seqlen": most})


def prompts(
    model: nn.Module,
    config: CalibrationConfig,
    seed: int = 0,
    lengths: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Token ids [1, n] of each sample: from `max_seqlen` tokens down by halves, and over again.

    Args:
        lengths: other ones, one after another and over again.
        seed: other ones give other samples; of files, parts that begin elsewhere.

    Raises:
        ConfigError: there is no tokenizer, a file is empty or not UTF-8, or as `fitting`.
        FileNotFoundError: a file isn't there.
    """
    tokenizer = _tokenizer(model, config.tokenizer)
    begin = opening_tokens(tokenizer)
    lengths = lengths or _halves(fitting(model, config).max_seqlen)
    for index in range(config.samples):
        # All lengths with one kind of task, or one file, before the next.
        turn, place = divmod(index, len(lengths))
        length = lengths[place]
        if config.text_files is None:
            task = make_task(turn, f"{seed}/{index}")
            opening = [*begin, *_tail(tokenizer, f"{task.opening}\n")]
            question = _tail(tokenizer, task.question)
            middle = _many(tokenizer, (f"{line}\n" for line in task.lines))
        else:
            path = config.text_files[turn % len(config.text_files)]
            opening, question = begin, []
            middle = _many(tokenizer, _parts(path, (_NEXT * index + _APART * seed) % 1.0))
        wanted = length - len(opening) - len(question)
        if wanted < 1:
            takes = f"at least {length - wanted + 1} tokens for a prompt of this kind"
            raise ConfigError(describe("calibration.max_seqlen", length, takes, _REMEDY))
        ids = torch.tensor([[*opening, *islice(middle, wanted), *question]])
        _check_known(model, ids)
        yield ids


def held_out_prompts(model: nn.Module, config: CalibrationConfig) -> Iterator[Tensor]:
    """Prompts that `prompts` doesn't make by itself: other samples, of as many lengths, between its own.

    Raises:
        ConfigError: as `prompts`.
    """
    own = _halves(fitting(model, config).max_seqlen)
    between = [own[0] * 7 // 8, *(length * 3 // 4 for length in own[:-1])] if own[1:] else own
    return prompts(model, config, HELD_OUT, between)


def _check_known(model: nn.Module, ids: Tensor) -> None:
    embed: Any = getattr(model, "get_input_embeddings", lambda: None)()
    known: int | None = getattr(embed, "num_embeddings", None)
    if known is not None and int(ids.max()) >= known:
        takes = f"one for this model, which knows {known} tokens"
        raise ConfigError(
            describe("calibration.tokenizer", f"token {int(ids.max())}", takes, _REMEDY)
        )


def _halves(longest: int) -> list[int]:
    lengths = [longest]
    while lengths[-1] >= 2 * LEAST:
        lengths.append(lengths[-1] // 2)
    return lengths


def _tokenizer(model: nn.Module, name: str | None) -> Any:
    name = name or getattr(model, "name_or_path", "") or ""
    remedy = f"{_REMEDY} Or give calibration.tokenizer."
    if not name:
        got = "a model that wasn't loaded from a checkpoint"
        raise ConfigError(describe("calibration.tokenizer", got, "a name or path", remedy))
    tokenizer = tokenizer_of(name)
    if tokenizer is None:
        got, takes = f"{name!r}, which has none", "the name or path of a tokenizer"
        raise ConfigError(describe("calibration.tokenizer", got, takes, remedy))
    return tokenizer


def tokenizer_of(name: str) -> Any | None:
    """The tokenizer of a checkpoint, by name or path; None where it has none.

    Without its files transformers raises, or makes one that knows nothing, by family.
    """
    try:
        found = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if len(found.get_vocab()) > len(found.all_special_ids) else None


def opening_tokens(tokenizer: Any) -> list[int]:
    """The tokens that every text begins with; what others end with isn't among them."""
    own = _tail(tokenizer, "a")
    return list(takewhile(lambda token: token not in own, tokenizer("a")["input_ids"]))


def _tail(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _many(tokenizer: Any, parts: Iterator[str]) -> Iterator[int]:
    text = ""
    for part in parts:
        text += part
        if len(text) >= _CHARACTERS:
            yield from _tail(tokenizer, text)
            text = ""
    yield from _tail(tokenizer, text)


def _parts(path: str, start: float) -> Iterator[str]:
    """The file from a place between 0, its beginning, and 1 on, and round and round."""
    text = read_text(Path(path), "calibration.text_files", ConfigError)
    if not text.strip():
        raise ConfigError(describe("calibration.text_files", f"{path!r}, which is empty", "text"))
    position = int(start * len(text))
    while True:
        yield text[position : position + _CHARACTERS]
        position = position + _CHARACTERS if position + _CHARACTERS < len(text) else 0

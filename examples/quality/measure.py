"""Samples of a task, or windows of text, through a model without and with each variant."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modelopt_sparse as mtsa
from examples.quality.cells import TEXT, Cell
from examples.quality.variants import DECODE, Variant
from examples.tiny_lm.evaluate import bits_per_byte, text_windows
from examples.tiny_lm.tasks import Sample, exact_match, sample

BATCH_TOKENS = 32_768
DECODED_BYTES = 64


def measured(
    model: nn.Module,
    group: str,
    variants: Sequence[Variant],
    task: str,
    length: int,
    count: int,
    seed: int,
    text: bytes,
) -> Iterator[Cell]:
    """A cell for each variant, all of the same `count` samples of `length` tokens.

    Args:
        model: dense, and dense again after each cell.
        task: a name in `tasks.TASKS`, or `TEXT` for bits per byte.
        seed: chooses the samples.
        text: held-out text.
    """
    phase = "decode" if group == DECODE else "prefill"
    logits_of = decoded if group == DECODE else at_once
    if task == TEXT:
        windows = text_windows(text, count, length, seed)
        bits_of = _decoded_bits if group == DECODE else _bits
        dense_bits = bits_of(model, windows)
        for variant in variants:
            with variant.applied(model):
                bits, tiles = bits_of(model, windows), _tiles(model, phase)
            yield Cell(
                group, variant.name, task, length, count,
                dense_bits=dense_bits, sparse_bits=bits, **tiles,
            )  # fmt: skip
        return
    rng = random.Random(f"{task} {length} {seed}")
    samples = [sample(task, length, rng, text) for _ in range(count)]
    dense = _answered(model, samples, logits_of)
    for variant in variants:
        with variant.applied(model):
            sparse, tiles = _answered(model, samples, logits_of), _tiles(model, phase)
        yield Cell(
            group, variant.name, task, length, count,
            dense=int(dense.sum()), sparse=int(sparse.sum()),
            lost=int((dense & ~sparse).sum()), gained=int((sparse & ~dense).sum()), **tiles,
        )  # fmt: skip


def _bits(model: nn.Module, windows: Tensor) -> tuple[float, ...]:
    return tuple(bits_per_byte(model, window[None]) for window in windows)


def _decoded_bits(model: nn.Module, windows: Tensor) -> tuple[float, ...]:
    """Of the last bytes of each window, which are decoded."""
    found: list[float] = []
    for part in windows.split(max(BATCH_TOKENS // windows.shape[1], 1)):
        tokens = part.to(model.device)
        logits = decoded(model, tokens[:, :-1], DECODED_BYTES).transpose(1, 2)
        losses = F.cross_entropy(logits.float(), tokens[:, -DECODED_BYTES:], reduction="none")
        found += (losses.mean(1) / math.log(2)).tolist()
    return tuple(found)


@torch.no_grad()
def at_once(model: nn.Module, tokens: Tensor, keep: int) -> Tensor:
    """Logits [batch, keep, vocabulary] of the last positions, from one call: all of it is prefill."""
    return model(tokens, use_cache=False, logits_to_keep=keep).logits


@torch.no_grad()
def decoded(model: nn.Module, tokens: Tensor, keep: int) -> Tensor:
    """The same, with the last positions given one after the other, so that they are decode."""
    prompt, steps = tokens[:, :-keep], tokens[:, -keep:]
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    logits = [
        model(step, past_key_values=cache, use_cache=True).logits for step in steps.split(1, dim=1)
    ]
    return torch.cat(logits, 1)


def _answered(
    model: nn.Module,
    samples: Sequence[Sample],
    logits_of: Callable[[nn.Module, Tensor, int], Tensor],
) -> np.ndarray:
    """Whether each sample is answered exactly: bool [samples]."""
    length = len(samples[0].tokens)
    batch = max(BATCH_TOKENS // length, 1)
    found = []
    for first in range(0, len(samples), batch):
        part = samples[first : first + batch]
        keep = length - min(one.answers[0][0] for one in part) + 1
        tokens = torch.from_numpy(np.stack([one.tokens for one in part])).to(model.device)
        predictions = logits_of(model, tokens, keep).argmax(-1).cpu().numpy()
        found += [exact_match(ids, one) for ids, one in zip(predictions, part, strict=True)]
    return np.array(found)


def _tiles(model: nn.Module, phase: str) -> dict[str, int]:
    """Tiles of a phase visible and skipped since the model was sparsified."""
    entries = [entry[phase] for entry in mtsa.get_stats(model).values() if entry.get(phase)]
    return {
        name: int(sum(sum(entry[name]) for entry in entries)) for name in ("visible", "skipped")
    }

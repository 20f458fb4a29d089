"""Samples of a task, or windows of text, through a model without and with each variant."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

import modelopt_sparse as mtsa
from examples.quality.cells import TEXT, Cell
from examples.quality.variants import Variant
from examples.tiny_lm.evaluate import bits_per_byte, text_windows
from examples.tiny_lm.tasks import Sample, exact_match, sample

BATCH_TOKENS = 32_768


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
    if task == TEXT:
        windows = text_windows(text, count, length, seed)
        dense_bits = _bits(model, windows)
        for variant in variants:
            with variant.applied(model):
                bits, tiles = _bits(model, windows), _tiles(model)
            yield Cell(
                group, variant.name, task, length, count,
                dense_bits=dense_bits, sparse_bits=bits, **tiles,
            )  # fmt: skip
        return
    rng = random.Random(f"{task} {length} {seed}")
    samples = [sample(task, length, rng, text) for _ in range(count)]
    dense = _answered(model, samples)
    for variant in variants:
        with variant.applied(model):
            sparse, tiles = _answered(model, samples), _tiles(model)
        yield Cell(
            group, variant.name, task, length, count,
            dense=int(dense.sum()), sparse=int(sparse.sum()),
            lost=int((dense & ~sparse).sum()), gained=int((sparse & ~dense).sum()), **tiles,
        )  # fmt: skip


def _bits(model: nn.Module, windows: Tensor) -> tuple[float, ...]:
    return tuple(bits_per_byte(model, window[None]) for window in windows)


@torch.no_grad()
def _answered(model: nn.Module, samples: Sequence[Sample]) -> np.ndarray:
    """Whether each sample is answered exactly: bool [samples]."""
    length = len(samples[0].tokens)
    batch = max(BATCH_TOKENS // length, 1)
    found = []
    for first in range(0, len(samples), batch):
        part = samples[first : first + batch]
        keep = length - min(one.answers[0][0] for one in part) + 1
        tokens = torch.from_numpy(np.stack([one.tokens for one in part])).to(model.device)
        logits = model(tokens, use_cache=False, logits_to_keep=keep).logits
        predictions = logits.argmax(-1).cpu().numpy()
        found += [exact_match(ids, one) for ids, one in zip(predictions, part, strict=True)]
    return np.array(found)


def _tiles(model: nn.Module) -> dict[str, int]:
    """Tiles of prefill visible and skipped since the model was sparsified."""
    entries = [entry["prefill"] for entry in mtsa.get_stats(model).values() if entry.get("prefill")]
    return {
        name: int(sum(sum(entry[name]) for entry in entries)) for name in ("visible", "skipped")
    }

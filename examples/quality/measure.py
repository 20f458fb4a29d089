"""Samples of a task, or windows of text, through a model without and with each variant."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Run:
    """Samples, and the group whose variants are measured on them.

    Args:
        group: a name in `variants.GROUPS`.
        task: a name in `tasks.TASKS`, or `TEXT` for bits per byte.
        length: tokens of a sample.
        samples, seed: how many, and what chooses them.
    """

    group: str
    task: str
    length: int
    samples: int
    seed: int = 0

    @property
    def is_decode(self) -> bool:
        """Whether answers are decoded, not run with the prompt."""
        return self.group == DECODE

    def cell(self, variant: Variant, **found: Any) -> Cell:
        """What was found of a variant."""
        place = self.group, variant.name, self.task, self.length
        return Cell(*place, self.samples, (self.seed,), **found)


def measured(
    model: nn.Module, run: Run, variants: Sequence[Variant], text: bytes
) -> Iterator[Cell]:
    """A cell for each variant, all of the same samples.

    Args:
        model: dense, and dense again after each cell.
        text: held-out text.
    """
    phase = "decode" if run.is_decode else "prefill"
    if run.task == TEXT:
        windows = text_windows(text, run.samples, run.length, run.seed)
        bits_of = _decoded_bits if run.is_decode else _bits
        dense_bits = bits_of(model, windows)
        for variant in variants:
            with variant.applied(model):
                bits, tiles = bits_of(model, windows), _tiles(model, phase)
            yield run.cell(variant, dense_bits=dense_bits, sparse_bits=bits, **tiles)
        return
    rng = random.Random(f"{run.task} {run.length} {run.seed}")
    samples = [sample(run.task, run.length, rng, text) for _ in range(run.samples)]
    logits_of = decoded if run.is_decode else at_once
    dense = _answered(model, samples, logits_of)
    for variant in variants:
        with variant.applied(model):
            sparse, tiles = _answered(model, samples, logits_of), _tiles(model, phase)
        yield run.cell(
            variant,
            dense=int(dense.sum()),
            sparse=int(sparse.sum()),
            lost=int((dense & ~sparse).sum()),
            gained=int((sparse & ~dense).sum()),
            **tiles,
        )


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

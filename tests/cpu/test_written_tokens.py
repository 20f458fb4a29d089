"""The tokens that a model writes while it is calibrated: drawn as it predicts them, and the same again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modelopt_sparse as mtsa
from modelopt_sparse.calibration.loop import _drawn, run_prompts
from modelopt_sparse.config.calibration import CalibrationConfig
from modelopt_sparse.module_state import sparse_modules
from tests.cpu import tiny
from tests.cpu.tiny import SKIP, tiny_llama

STEPS = 12


def written(model: nn.Module, batch: object, steps: int = STEPS, **config: int) -> torch.Tensor:
    """[B, steps] tokens that the model writes after a batch."""
    given = []

    def seen(_module: nn.Module, args: tuple[torch.Tensor]) -> None:
        if args[0].shape[1] == 1:
            given.append(args[0])

    hook = model.register_forward_pre_hook(seen)
    with torch.no_grad():
        run_prompts(model, [batch], CalibrationConfig(num_decode_tokens=steps, **config))
    hook.remove()
    return torch.cat(given, 1)


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(seed))


def test_a_token_is_drawn_as_often_as_it_is_likely():
    likely = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.25, 0.0])
    generators = [torch.Generator().manual_seed(seed) for seed in range(2000)]
    tokens = _drawn(likely.log().bfloat16().expand(2000, -1), generators)
    found = tokens.flatten().bincount(minlength=6) / 2000
    torch.testing.assert_close(found, likely, atol=0.04, rtol=0)
    assert tokens.shape == (2000, 1) and not found[likely == 0].any()


def test_where_all_tokens_are_as_likely_they_are_written_as_often():
    model = tiny_llama()
    nn.init.zeros_(model.lm_head.weight)
    tokens = written(model, torch.cat([prompt(20), prompt(20, 1)]), 100)
    first, second = tokens
    # Each of 64 is there with probability 0.79.
    assert all(40 <= len(row.unique()) <= 60 for row in tokens)
    assert (first == second).double().mean() < 0.2


@pytest.mark.parametrize("padding", ["left", "right"])
def test_what_is_written_depends_on_the_sequence_alone(padding):
    """However it is cut into chunks, and whatever it is in a batch with."""
    model = tiny_llama()
    long, short = prompt(150), prompt(60, 1)
    alone = [written(model, long), written(model, short)]
    assert len(torch.cat(alone).unique()) > 3
    assert torch.equal(written(model, long, chunk_size=128), alone[0])
    ids, mask = padded(long, short, padding)
    found = written(model, {"input_ids": ids, "attention_mask": mask})
    assert torch.equal(found, torch.cat(alone, 1))


def padded(
    long: torch.Tensor, short: torch.Tensor, padding: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of a batch of both."""
    place = slice(-short.shape[1], None) if padding == "left" else slice(short.shape[1])
    ids, mask = torch.full_like(long, 63).repeat(2, 1), torch.ones_like(long).repeat(2, 1)
    ids[0], ids[1, place] = long[0], short[0]
    mask[1] = 0
    mask[1, place] = 1
    return ids, mask


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_padded_batch_calibrates_as_its_sequences_do(padding):
    long, short = tiny.prompt(300), tiny.prompt(200, seed=1)
    ids, mask = padded(long, short, padding)
    config = {"target_sparse_ratio": 0.3}

    def found(batches: object) -> list[object]:
        model = mtsa.calibrate(mtsa.sparsify(tiny_llama(), SKIP), config, batches)
        return [module.method.config for _, module in sparse_modules(model)]

    assert found([{"input_ids": ids, "attention_mask": mask}]) == found([long, short])

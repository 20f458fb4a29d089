"""The tokens that a model writes while it is calibrated: drawn as it predicts them, and the same again."""

from __future__ import annotations

import torch
from torch import nn

from modelopt_sparse.calibration.loop import _drawn, run_prompts
from modelopt_sparse.config.calibration import CalibrationConfig
from tests.cpu.tiny import tiny_llama

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


def test_what_is_written_depends_on_the_sequence_alone():
    """However it is cut into chunks, and whatever it is in a batch with."""
    model = tiny_llama()
    long, short = prompt(150), prompt(60, 1)
    alone = torch.cat([written(model, long), written(model, short)])
    assert len(alone.unique()) > 3
    assert torch.equal(written(model, long, chunk_size=128), alone[:1])
    ids = torch.full((2, 150), 63)
    ids[0], ids[1, -60:] = long[0], short[0]
    mask = torch.ones_like(ids)
    mask[1, :-60] = 0
    assert torch.equal(written(model, {"input_ids": ids, "attention_mask": mask}), alone)

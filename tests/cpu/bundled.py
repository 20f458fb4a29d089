"""The first layers of the bundled model, text for them, and what they skip."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import modelopt_sparse as mtsa
from modelopt_sparse.kernels.types import DENSE
from modelopt_sparse.module import observed
from modelopt_sparse.module_state import sparse_modules

MODEL = Path(__file__).resolve().parents[2] / "examples/tiny_lm/model"
LAYERS = 3


def dense_model() -> nn.Module:
    """In float32. Few layers, to be quick."""
    return AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, num_hidden_layers=LAYERS
    ).eval()


def source(length: int, start: int = 0) -> torch.Tensor:
    """[1, length] tokens of Python source."""
    text = Path(nn.functional.__file__).read_bytes()[start : start + length - 1]
    return torch.tensor([[256, *text]])


def shares(model: nn.Module, phase: str) -> float:
    found = [entry[phase] for entry in mtsa.get_stats(model).values() if entry[phase]]
    return sum(sum(x["skipped"]) for x in found) / sum(sum(x["visible"]) for x in found)


def methods(model: nn.Module) -> list:
    return [module.method.config for _, module in sparse_modules(model)]


def output_error(model: nn.Module, prompts: list[torch.Tensor]) -> float:
    """The mean over layers of |sparse - dense|^2 / |dense|^2, each on the inputs of the dense model."""
    found: dict[str, torch.Tensor] = {}

    def observer(name: str):
        def observe(call, plan):
            dense = call(DENSE)
            error = (call(plan).out - dense.out).square().sum()
            found[name] = found.get(name, torch.zeros(2)) + torch.stack(
                [error, dense.out.square().sum()]
            )
            return dense

        return observe

    with observed({module: observer(name) for name, module in sparse_modules(model)}):
        for prompt in prompts:
            model(prompt)
    return sum(float(error / whole) for error, whole in found.values()) / len(found)


def generated(model: nn.Module, prompt: torch.Tensor) -> torch.Tensor:
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(out.logits)

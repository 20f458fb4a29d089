"""Skip-softmax beside other ways to choose tiles, at equal sparsity: bits per byte of the bundled model.

    python -m examples.tile_choices --length 2048 --windows 4

Every choice keeps as many tiles of each head as skip-softmax does in the same call.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM

import modelopt_sparse as mtsa
from examples.tiny_lm.evaluate import bits_per_byte, text_windows
from examples.tiny_lm.text import held_out_text
from modelopt_sparse.calls import AttentionCall, Observer
from modelopt_sparse.faithfulness.selectors import SELECTORS, Selector, chosen_like
from modelopt_sparse.kernels import AttentionOutput, Plan
from modelopt_sparse.module import observed
from modelopt_sparse.module_state import sparse_modules

MODEL = Path(__file__).parent / "tiny_lm/model"


def choosing(selector: Selector) -> Observer:
    """Computes a module's calls over the tiles that a selector chooses."""

    def observe(call: AttentionCall, plan: Plan) -> AttentionOutput:
        return call(Plan(tiles=chosen_like(call, plan, selector)))

    return observe


def measured(model: nn.Module, windows: torch.Tensor) -> dict[str, float]:
    """Bits per byte, dense, by skip-softmax and by each selector."""
    found = {}
    modules = [module for _, module in sparse_modules(model)]
    mtsa.disable_sparse_attention(model)
    found["dense"] = bits_per_byte(model, windows)
    mtsa.enable_sparse_attention(model)
    found["skip-softmax"] = bits_per_byte(model, windows)
    for name, selector in SELECTORS.items():
        with observed(dict.fromkeys(modules, choosing(selector))):
            found[name] = bits_per_byte(model, windows)
    return found


def main(
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    windows: Annotated[int, typer.Option(help="Windows of held-out text.")] = 4,
    threshold: Annotated[float, typer.Option(help="Lambda of skip-softmax.")] = 0.1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write it.")] = None,
) -> None:
    """Print bits per byte of each choice, and the share of tiles that all of them skip."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device).eval()
    config = mtsa.SKIP_SOFTMAX_TRITON_DEFAULT.with_rule("*", skip_softmax_threshold=threshold)
    mtsa.sparsify(model, config)
    found = measured(model, text_windows(held_out_text(2_000_000), windows, length))
    tiles = [entry["prefill"] for entry in mtsa.get_stats(model).values()]
    share = sum(sum(x["skipped"]) for x in tiles) / sum(sum(x["visible"]) for x in tiles)
    table = Table("tiles chosen by", "bits per byte", "more than dense")
    table.title = f"{windows} windows of {length} bytes, {share:.1%} of tiles skipped"
    for name, bits in found.items():
        table.add_row(name, f"{bits:.4f}", f"{bits - found['dense']:+.4f}")
    Console().print(table)
    if json_file:
        json_file.write_text(json.dumps({"skipped": share, "bits_per_byte": found}, indent=2))


if __name__ == "__main__":
    typer.run(main)

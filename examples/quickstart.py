"""The main job on a small trained model: sparsify it, read what was skipped and what that cost, undo it.

python examples/quickstart.py            # under a minute on two CPU cores
python examples/quickstart.py --preset sparse_softmax --length 2048
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.utils import logging

# The file runs from any folder: its neighbours are found from the repository's root.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from examples.skip_map import save_picture  # noqa: E402 (after the path)
from examples.tiny_lm.evaluate import bits_per_byte, task_accuracy, text_windows  # noqa: E402
from examples.tiny_lm.text import held_out_text  # noqa: E402
from modelopt_sparse import PRESETS  # noqa: E402
from modelopt_sparse_cli.comparison import Measure, compare  # noqa: E402
from modelopt_sparse_cli.heads import skipped_by_head  # noqa: E402


def main(
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "skip_softmax",
    length: Annotated[int, typer.Option(help="Tokens of each prompt.", min=256, max=8192)] = 4096,
    windows: Annotated[int, typer.Option(help="Windows of text to score.", min=1)] = 2,
    needles: Annotated[int, typer.Option(help="Prompts with eight needles.", min=1)] = 3,
    picture: Annotated[Path, typer.Option(help="Where the heat map goes.")] = Path(
        "out/quickstart.png"
    ),
) -> None:
    """Compare the bundled model with itself, dense and sparse, on real text."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"got {preset!r}; takes one of {', '.join(PRESETS)}")
    console = Console()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        ROOT / "examples/tiny_lm/model", dtype=torch.float32
    ).eval()
    text = held_out_text()
    rows = text_windows(text, windows, length + 1)

    def needles_of(seed: int) -> float:
        return task_accuracy(model, "needles_8", length, 1, seed=seed, text=text)

    measures = {
        "bits per byte": Measure([lambda row=row: bits_per_byte(model, row[None]) for row in rows]),
        "needles found": Measure(
            [lambda seed=seed: needles_of(seed) for seed in range(needles)], ".0%"
        ),
    }
    found = compare(model, PRESETS[preset], measures, rows[:1, :256])
    title = (
        f"{windows} windows of held-out source, {needles} prompts with 8 needles, {length} tokens"
    )
    found.show(console, measures, title)
    shares = skipped_by_head(found.stats)
    if shares is not None:
        save_picture(shares, f"{preset}, {length} tokens: tiles skipped", picture)
        console.print(f"Heat map of skipped tiles: {picture}")
    raise typer.Exit(code=0 if found.is_restored else 1)


if __name__ == "__main__":
    typer.run(main)

"""Dense against sparse on the bundled model: exact answers to its tasks, and bits per byte.

    python -m examples.quality --group presets --task needle --length 2048 --samples 20 --json out.json
    python -m examples.quality.merge out*.json --json all.json

Runs of other variants, tasks, lengths and seeds can go side by side; their files add up.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM

from examples.quality.cells import TEXT, Cell, save
from examples.quality.measure import Run, measured
from examples.quality.tables import summary
from examples.quality.variants import GROUPS
from examples.tiny_lm.tasks import TASKS
from examples.tiny_lm.text import held_out_text
from modelopt_sparse.bench.report import environment

MODEL = Path(__file__).parents[1] / "tiny_lm/model"
TEXT_BYTES = 8_000_000


def main(
    group: Annotated[list[str], typer.Option(help=f"Of {', '.join(GROUPS)}.")],
    task: Annotated[list[str], typer.Option(help=f"Of {', '.join(TASKS)}, {TEXT}.")],
    length: Annotated[list[int], typer.Option(help="Tokens of a sample.")],
    variant: Annotated[
        list[str] | None, typer.Option(help="Of these groups; all of them if none is named.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Of each task and length.")] = 500,
    seed: Annotated[int, typer.Option(help="Other ones give other samples.")] = 0,
    model_folder: Annotated[Path, typer.Option("--model", help="A model over bytes.")] = MODEL,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write it.")] = None,
) -> None:
    """Measure groups of variants; print a line each, and write all as JSON."""
    _check(group, GROUPS)
    _check(task, [*TASKS, TEXT])
    names = [each.name for one in group for each in GROUPS[one]]
    wanted = variant or names
    _check(wanted, names)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype).to(device).eval()
    text = held_out_text(TEXT_BYTES)
    console = Console(width=110)
    where = {**environment(device), "dtype": str(dtype)}
    cells: list[Cell] = []
    for place in product(group, task, length):
        run = Run(*place, samples, seed)
        variants = [each for each in GROUPS[run.group] if each.name in wanted]
        for cell in measured(model, run, variants, text):
            cells.append(cell)
            console.print(summary(cell), highlight=False)
            if json_file is not None:
                save(json_file, where, cells)


def _check(given: Collection[str], known: Collection[str]) -> None:
    if unknown := [name for name in given if name not in known]:
        got, takes = (", ".join(map(repr, names)) for names in (unknown, known))
        raise typer.BadParameter(f"got {got}; takes {takes}")


if __name__ == "__main__":
    typer.run(main)

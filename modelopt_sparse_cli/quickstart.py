"""``modelopt-sparse quickstart``: a model compared with itself, dense and sparse, on real text."""

from __future__ import annotations

import math
import sysconfig
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .comparison import Measure, compare
from .loading import import_libraries, load_model, on_gpu
from .options import MODEL_HELP, ConfigOption, JsonOption, Preset, PresetOption, chosen_config
from .reporting import reporting
from .texts import read_words, text_windows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

BUNDLED = Path(__file__).parents[1] / "examples/tiny_lm/model"
SCORED_TOKENS = 1024
"""Of each window, the last ones: logits of a large vocabulary are large."""


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help=f"{MODEL_HELP} In a clone of the repository: its own."
        ),
    ] = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    length: Annotated[int, typer.Option("--length", help="Tokens of each window.", min=16)] = 2048,
    windows: Annotated[
        int,
        typer.Option(
            "--windows",
            help="Windows to score, fewer of a --text too short for so many that don't overlap.",
            min=1,
        ),
    ] = 4,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            help="Text to score, in UTF-8; Python's own sources if none.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare a model with itself, dense and sparse: what was skipped, and what that cost.

    The configuration is --preset skip_softmax unless one is given. Exit code 1: after `unsparsify` the model
    isn't the same to the bit.
    """
    if model is None and not BUNDLED.is_dir():
        raise typer.BadParameter("MODEL: got none; takes a folder or the name of a model.")
    if preset is None and config is None:
        preset = Preset.skip_softmax
    name = str(BUNDLED) if model is None else model
    with reporting(as_json) as report:
        import_libraries()
        chosen = chosen_config(preset, config)
        loaded = on_gpu(load_model(name))
        words = python_sources(16 * windows * length) if text is None else read_words(text)
        rows = text_windows(name, loaded, words, length, windows)
        pieces = [partial(bits_per_token, loaded, row) for row in rows]
        measure = {"bits per token": Measure(pieces)}
        found = compare(loaded, chosen, measure, rows[0][:, :256])
        found.show(report.console, measure, f"{len(rows)} windows of {length} tokens")
        report.document = {
            "model": name,
            "config": chosen.to_dict(),
            "length": length,
            "windows": len(rows),
            "dense": found.dense,
            "sparse": found.sparse,
            "modules": found.stats,
            "restored": found.is_restored,
        }
    if not found.is_restored:
        raise typer.Exit(1)


def bits_per_token(model: PreTrainedModel, row: Tensor) -> float:
    """Bits per token of the last `SCORED_TOKENS` of a row, after all that precedes them."""
    import torch
    import torch.nn.functional as F

    count = min(SCORED_TOKENS, row.shape[1] - 1)
    with torch.no_grad():
        logits = model(row[:, :-1], use_cache=False, logits_to_keep=count).logits[0, -count:]
    return F.cross_entropy(logits.float(), row[0, -count:]).item() / math.log(2)


def python_sources(size: int) -> str:
    """The first `size` characters of the standard library's modules, one after another."""
    text = ""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if len(text) >= size:
            break
        text += path.read_text(encoding="utf-8", errors="ignore")
    return text[:size]

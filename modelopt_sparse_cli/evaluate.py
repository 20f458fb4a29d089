"""``modelopt-sparse eval``: a model dense and sparse on text of the user's, and how far apart the two are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .loading import import_libraries, load_sparse_model
from .options import (
    ConfigOption,
    JsonOption,
    ModelArgument,
    PresetOption,
    TextOption,
    check_not_both,
    config_if_given,
)
from .reporting import progress, reporting
from .texts import check_length, read_words, text_windows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

LengthOption = Annotated[
    int, typer.Option("--length", help="Tokens of each window or prompt.", min=128)
]
SamplesOption = Annotated[
    int,
    typer.Option(
        "--samples",
        help="Windows of each file, fewer of one too short for so many that don't overlap; "
        "or made-up prompts.",
        min=1,
    ),
]


def command(
    model: ModelArgument,
    preset: PresetOption = None,
    config: ConfigOption = None,
    text: TextOption = None,
    length: LengthOption = 2048,
    samples: SamplesOption = 4,
    decode_tokens: Annotated[
        int,
        typer.Option(
            help="Decode so many tokens at the end of each, and score these alone: 2 or more.",
            min=0,
        ),
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Run a model dense and sparse: bits per token, KL and agreement with intervals; error by module.

    Takes --preset or --config, or a checkpoint that is sparse already.
    """
    check_not_both(preset, config)
    with reporting(as_json) as report:
        import_libraries()
        import modelopt_sparse as mtsa

        sparse = load_sparse_model(model, config_if_given(preset, config))
        batches = token_batches(model, sparse, text or (), length, samples)
        with progress() as bar:
            tracked = bar.track(batches, description="dense and sparse")
            found = mtsa.compare(sparse, tracked, num_decode_tokens=decode_tokens)
        found.print(report.console)
        report.document = {"model": model, "length": length, **found.to_dict()}


def token_batches(
    name: str, model: PreTrainedModel, texts: Sequence[Path], length: int, samples: int
) -> list[Tensor]:
    """Token ids [1, n] on the model's device.

    Raises:
        ArgumentError: the model takes fewer tokens or has no tokenizer, or a text is too short or not UTF-8.
        ConfigError: there is no tokenizer for made-up prompts.
    """
    from modelopt_sparse import CalibrationConfig
    from modelopt_sparse.calibration.prompts import HELD_OUT, prompts

    if texts:
        words = map(read_words, texts)
        windows = [text_windows(name, model, each, length, samples) for each in words]
        return [ids for each in windows for ids in each]
    check_length(model, length)
    made = CalibrationConfig(samples=samples, tokenizer=name)
    return [ids.to(model.device) for ids in prompts(model, made, HELD_OUT, [length])]

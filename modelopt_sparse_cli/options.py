"""Arguments that several commands take, and what they stand for."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from modelopt_sparse import SparseAttentionConfig


class Preset(StrEnum):
    """The names in `modelopt_sparse.PRESETS`, which can't be asked for without importing torch."""

    skip_softmax = "skip_softmax"
    sparse_softmax = "sparse_softmax"
    skip_sparse_softmax = "skip_sparse_softmax"
    flash_skip_softmax = "flash_skip_softmax"
    skip_softmax_calib = "skip_softmax_calib"
    flash_skip_softmax_calib = "flash_skip_softmax_calib"


MODEL_HELP = "Folder of a checkpoint, or its name on the Hugging Face hub."
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
PresetOption = Annotated[
    Preset | None, typer.Option("--preset", help="A ready-made configuration.")
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="A configuration of your own, as JSON or YAML, in place of a preset.",
        exists=True,
        dir_okay=False,
    ),
]
OutputFolder = Annotated[Path, typer.Option("--output", metavar="DIR", help="Where to write it.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace the checkpoint or file that is there.")
]
TextOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="Text of your own, in UTF-8; give it as often as you have files. Made-up prompts if none.",
        exists=True,
        dir_okay=False,
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json", help="One JSON document on standard output; all else goes to standard error."
    ),
]


def check_choice(preset: Preset | None, config: Path | None) -> None:
    """Raises typer.BadParameter unless one of the two is given."""
    check_not_both(preset, config)
    if preset is None and config is None:
        raise typer.BadParameter("got neither; takes one of --preset and --config.")


def check_not_both(preset: Preset | None, config: Path | None) -> None:
    """Raises typer.BadParameter if both are given."""
    if preset is not None and config is not None:
        raise typer.BadParameter("got both; takes one of --preset and --config.")


def chosen_config(preset: Preset | None, config: Path | None) -> SparseAttentionConfig:
    """The configuration that `--preset` or `--config` stands for.

    Raises:
        ConfigError: what the file holds isn't one.
    """
    check_choice(preset, config)
    found = config_if_given(preset, config)
    assert found is not None
    return found


def config_if_given(preset: Preset | None, config: Path | None) -> SparseAttentionConfig | None:
    """The same, or None if neither is given.

    Raises:
        ConfigError: what the file holds isn't one.
    """
    from modelopt_sparse import PRESETS, SparseAttentionConfig

    check_not_both(preset, config)
    if preset is not None:
        return PRESETS[preset]
    return None if config is None else SparseAttentionConfig.load(config)

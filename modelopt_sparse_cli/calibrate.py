"""``modelopt-sparse calibrate``: a checkpoint that skips the share of tiles that is asked for."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .fitted import fitted_thresholds, table_of
from .folders import check_output
from .loading import import_libraries, load_sparse_model
from .options import (
    ConfigOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    OutputFolder,
    PresetOption,
    TextOption,
    check_not_both,
    config_if_given,
)
from .reporting import Report, progress, reporting
from .saving import save_checkpoint, say_saved

if TYPE_CHECKING:
    from modelopt_sparse import CalibrationConfig, SparseAttentionConfig


class ThresholdsFor(StrEnum):
    """What has thresholds of its own."""

    model = "model"
    layer = "layer"
    head = "head"


class Form(StrEnum):
    """What runs."""

    table = "table"
    formula = "formula"


def _share(name: str, help: str) -> Any:
    return typer.Option(name, help=f"{help} From 0 to below 1.", metavar="SHARE")


def _bound(name: str, help: str) -> Any:
    return typer.Option(name, help=f"In place of a share: {help}, in both phases.", metavar="BOUND")


TargetOption = Annotated[
    float | None,
    _share("--target-sparsity", "Tiles to skip, of those visible, in both phases; else 0.5."),
]
PrefillOption = Annotated[
    float | None, _share("--prefill-sparsity", "The same in prefill; 0 is dense.")
]
DecodeOption = Annotated[
    float | None, _share("--decode-sparsity", "The same in decode; 0 is dense.")
]
ErrorOption = Annotated[
    float | None,
    _bound("--target-error", "the most that attention outputs may be off, relative to them"),
]
MassOption = Annotated[
    float | None,
    _bound("--target-dropped-mass", "the most softmax weight in skipped tiles, mean over rows"),
]
MaxMassOption = Annotated[
    float | None, _bound("--target-max-dropped-mass", "the same of the row that loses most")
]
ThresholdsForOption = Annotated[
    ThresholdsFor | None,
    typer.Option(help="What has a threshold of its own; else model: one for all modules."),
]
FormOption = Annotated[
    Form | None,
    typer.Option(help="What runs: the measured table; or the formula, which engines read."),
]
PromptsOption = Annotated[int | None, typer.Option(help="Prompts; else 12.", min=1)]
MaxSeqlenOption = Annotated[
    int | None,
    typer.Option(help="Tokens of the longest prompt; else 8192, or what the model takes."),
]
ChunkSizeOption = Annotated[
    int | None, typer.Option(help="Prompts run in chunks of so many tokens; else whole.")
]
DecodeTokensOption = Annotated[
    int | None, typer.Option(help="Tokens written after each prompt; else 64.", min=1)
]


def command(
    model: ModelArgument,
    output: OutputFolder,
    preset: PresetOption = None,
    config: ConfigOption = None,
    target: TargetOption = None,
    prefill: PrefillOption = None,
    decode: DecodeOption = None,
    target_error: ErrorOption = None,
    target_dropped_mass: MassOption = None,
    target_max_dropped_mass: MaxMassOption = None,
    thresholds_for: ThresholdsForOption = None,
    form: FormOption = None,
    samples: PromptsOption = None,
    max_seqlen: MaxSeqlenOption = None,
    chunk_size: ChunkSizeOption = None,
    num_decode_tokens: DecodeTokensOption = None,
    text: TextOption = None,
    check: Annotated[
        bool, typer.Option(help="Measure on other prompts what is skipped now.")
    ] = True,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the thresholds by which a model skips a share of tiles, and write a checkpoint with them.

    Takes --preset or --config, or a checkpoint that is sparse already. A `calibration` in the configuration
    counts where no option is given. The folder is written whole or not at all.
    """
    check_not_both(preset, config)
    check_output(output, force)
    given = {
        "target_sparse_ratio": _targets(target, prefill, decode),
        "target_error": target_error,
        "target_dropped_mass": target_dropped_mass,
        "target_max_dropped_mass": target_max_dropped_mass,
        "thresholds_for": thresholds_for and thresholds_for.value,
        "form": form and form.value,
        "samples": samples,
        "max_seqlen": max_seqlen,
        "chunk_size": chunk_size,
        "num_decode_tokens": num_decode_tokens,
        "text_files": tuple(map(str, text)) if text else None,
    }
    with reporting(as_json) as report:
        import_libraries()
        _calibrate(report, model, output, config_if_given(preset, config), given, check)


def _calibrate(
    report: Report,
    name: str,
    output: Path,
    chosen: SparseAttentionConfig | None,
    given: dict[str, Any],
    check: bool,
) -> None:
    """Loads the model, calibrates it, checks it if that is wanted, saves it, and says what was found."""
    import modelopt_sparse as mtsa
    from modelopt_sparse.calibration.prompts import fitting, held_out_prompts, prompts
    from modelopt_sparse.module_state import module_states

    in_file = None if chosen is None else chosen.calibration
    if chosen is not None:
        chosen = chosen.model_copy(update={"calibration": None})  # that comes below
    aim = _aim(in_file, given)
    model = load_sparse_model(name, chosen)
    aim = fitting(model, aim)
    count: Any = {"total": aim.samples}
    found = None
    with progress() as bar:
        data = bar.track(prompts(model, aim), description="calibrating", **count)
        mtsa.calibrate(model, aim, data)
        fitted = fitted_thresholds(model)
        if check and any(row["target"] for row in fitted):
            data = bar.track(held_out_prompts(model, aim), description="checking   ", **count)
            found = mtsa.check_calibration(model, data, aim)
    report.console.print(table_of(fitted))
    if found is not None:
        found.print(report.console)
    elif check:
        report.console.print("Not checked: all targets are 0, so there is nothing to measure.")
    has_tokenizer = save_checkpoint(model, name, output)
    say_saved(report.console, name, output, has_tokenizer)
    report.document = {
        "model": name,
        "output": str(output),
        "calibration": aim.model_dump(mode="json"),
        "thresholds": fitted,
        "check": None if found is None else found.to_dict(),
        "modules": module_states(model),
        "has_tokenizer": has_tokenizer,
    }


def _targets(
    both: float | None, prefill: float | None, decode: float | None
) -> float | dict[str, float] | None:
    phases = {"prefill": prefill, "decode": decode}
    by_phase = {phase: share for phase, share in phases.items() if share is not None}
    if both is not None and by_phase:
        takes = "it, or one or both of --prefill-sparsity and --decode-sparsity"
        raise typer.BadParameter(f"--target-sparsity: got it and one of a phase; takes {takes}.")
    return both if both is not None else by_phase or None


def _aim(in_file: CalibrationConfig | None, given: dict[str, Any]) -> CalibrationConfig:
    """What is asked for: by options, then by the file, then by default.

    Raises:
        ConfigError: a value isn't taken.
    """
    from modelopt_sparse import CalibrationConfig
    from modelopt_sparse.config.calibration import AIMS

    fields = {} if in_file is None else in_file.model_dump(exclude_unset=True)
    asked = {name: value for name, value in given.items() if value is not None}
    if any(name in asked for name in AIMS):
        fields = {name: value for name, value in fields.items() if name not in AIMS}
    fields |= asked
    return CalibrationConfig.load(fields)

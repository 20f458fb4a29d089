"""``modelopt-sparse export``: what a sparse checkpoint does, as serving engines read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .folders import check_output_file, write_whole
from .loading import blaming, check_is_sparse, import_libraries, load_model_config
from .options import ForceOption, JsonOption, ModelArgument
from .reporting import reporting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = "sparse_attention_config"
"""The name that engines read in config.json."""

POINTS = 3.0
"""A formula may be off by so many points of sparsity without a word."""


def command(
    model: ModelArgument,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Where to write it.")
    ] = None,
    into: Annotated[
        bool, typer.Option("--into", help="Write it into the config.json of MODEL, a folder.")
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say in the schema of TensorRT-LLM, vLLM-Omni and Model-Optimizer what a sparse checkpoint does.

    Needs thresholds that were calibrated, with one formula for all modules, and warns of one that misses the
    shares by far. Prints it unless it is written somewhere; a file is written whole or not at all. No weights
    are loaded.
    """
    if output is not None:
        check_output_file(output, force)
    with reporting(as_json) as report:
        import_libraries()
        import modelopt_sparse as mtsa

        check_is_sparse(model)
        empty = without_weights(model)
        export = mtsa.export_sparse_attention_config(empty)
        for phase, points in formulas_that_are_off(empty).items():
            # Standard output is the export alone.
            typer.echo(
                f"Warning: in {phase} the formula is off by up to {points:g} points of sparsity where it was "
                "fitted: engines, which read it alone, may skip so much more or less.",
                err=True,
            )
        text = json.dumps(export, indent=2) + "\n"
        if into:
            write_into(Path(model), export)
            report.console.print(f"Written into {Path(model) / 'config.json'}", soft_wrap=True)
        if output is not None:
            write_whole(output, text)
            report.console.print(f"Written: {output}", soft_wrap=True)
        if not into and output is None and not as_json:
            typer.echo(text, nl=False)
        report.document = export


def without_weights(name: str) -> PreTrainedModel:
    """The sparse model of a checkpoint; its tensors have no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    from modelopt_sparse.sparse_mode import restore_from_block

    with blaming(name), torch.device("meta"):
        auto_class: Any = AutoModelForCausalLM
        model: PreTrainedModel = auto_class.from_config(load_model_config(name))
        restore_from_block(model)
    return model


def formulas_that_are_off(model: PreTrainedModel) -> dict[str, float]:
    """By phase, the most points of sparsity that a formula is off, if these are more than `POINTS`."""
    from modelopt_sparse.calibration.calibrated import calibrated_phases

    found: dict[str, float] = {}
    for phase, _, module, threshold in calibrated_phases(model):
        if module.enabled and threshold.target_sparsity and threshold.formula:
            off = threshold.formula.worst_error or 0.0
            found[phase] = max(off, found.get(phase, 0.0))
    return {phase: off for phase, off in found.items() if off > POINTS}


def write_into(folder: Path, export: dict[str, Any]) -> None:
    """Adds the export to our block in config.json: engines read it, and `from_pretrained` the rest.

    Raises:
        ArgumentError: it is no folder, or the block that engines read is another's there.
    """
    from modelopt_sparse.errors import ArgumentError, describe
    from modelopt_sparse.integrations.hf_checkpoint import is_ours

    path = folder / "config.json"
    if not path.is_file():
        remedy = "Download it first, or leave out --into."
        takes = "the folder of a checkpoint, with --into"
        raise ArgumentError(describe("MODEL", repr(str(folder)), takes, remedy))
    content = json.loads(path.read_text(encoding="utf-8"))
    if not is_ours(content.get(BLOCK)):
        got = f"a config.json whose {BLOCK} belongs to the model itself"
        remedy = "Give the engine the file that --output writes."
        raise ArgumentError(describe("--into", got, "one whose block is ours", remedy))
    content[BLOCK].update(export)
    write_whole(path, json.dumps(content, indent=2) + "\n")

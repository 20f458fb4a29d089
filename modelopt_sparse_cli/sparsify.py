"""``modelopt-sparse sparsify``: a checkpoint with sparse attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .folders import check_output, folder_written_whole
from .loading import find_tokenizer, import_libraries, load_model
from .options import (
    ConfigOption,
    JsonOption,
    ModelArgument,
    PresetOption,
    check_choice,
    chosen_config,
)
from .reporting import reporting


def command(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Where to write it.")],
    preset: PresetOption = None,
    config: ConfigOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the checkpoint that is there.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint that `modelopt_sparse.from_pretrained` loads sparse, and others load dense.

    Takes --preset or --config. The folder is written whole or not at all.
    """
    check_choice(preset, config)
    check_output(output, force)
    with reporting(as_json) as report:
        import_libraries()
        import modelopt_sparse as mtsa
        from modelopt_sparse.module_state import module_states

        chosen = chosen_config(preset, config)
        sparse = load_model(model)
        mtsa.sparsify(sparse, chosen)
        tokenizer = find_tokenizer(model)
        with folder_written_whole(output) as folder:
            sparse.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        mtsa.print_sparse_attention_summary(sparse, report.console)
        if tokenizer is None:
            report.console.print(f"{model} has no tokenizer, so none was saved.", soft_wrap=True)
        call = f"modelopt_sparse.from_pretrained(AutoModelForCausalLM, {str(output)!r})"
        report.console.print(f"Saved. Load with {call}", soft_wrap=True)
        report.document = {
            "model": model,
            "output": str(output),
            "config": chosen.to_dict(),
            "modules": module_states(sparse),
            "has_tokenizer": tokenizer is not None,
        }

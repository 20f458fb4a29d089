"""``modelopt-sparse sparsify``: a checkpoint with sparse attention."""

from __future__ import annotations

from .folders import check_output
from .loading import import_libraries, load_model, make_sparse
from .options import (
    ConfigOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    OutputFolder,
    PresetOption,
    check_choice,
    chosen_config,
)
from .reporting import reporting
from .saving import save_checkpoint, say_saved


def command(
    model: ModelArgument,
    output: OutputFolder,
    preset: PresetOption = None,
    config: ConfigOption = None,
    force: ForceOption = False,
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
        make_sparse(sparse, chosen)
        has_tokenizer = save_checkpoint(sparse, model, output)
        mtsa.print_sparse_attention_summary(sparse, report.console)
        say_saved(report.console, model, output, has_tokenizer)
        report.document = {
            "model": model,
            "output": str(output),
            "config": chosen.to_dict(),
            "modules": module_states(sparse),
            "has_tokenizer": has_tokenizer,
        }

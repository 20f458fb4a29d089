"""``modelopt-sparse explain``: which modules become sparse and why, and which kernels they run here."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .loading import blaming, check_is_sparse, import_libraries, load_model_config
from .options import (
    ConfigOption,
    JsonOption,
    ModelArgument,
    PresetOption,
    check_not_both,
    config_if_given,
)
from .reporting import reporting, waiting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from modelopt_sparse import SparseAttentionConfig
    from modelopt_sparse.patterns import Target

    from .deciding import Decision

OWN = "the model's own attention"
"""What a module runs that shares no configuration with a sparse one."""


def command(
    model: ModelArgument,
    preset: PresetOption = None,
    config: ConfigOption = None,
    length: Annotated[int, typer.Option("--length", help="Tokens of the prompt.", min=2)] = 4096,
    as_json: JsonOption = False,
) -> None:
    """Say which attention modules become sparse and why, and which kernels they would run on this machine.

    Takes --preset or --config, or a checkpoint that is sparse already. Reads config.json alone, no weights.
    """
    check_not_both(preset, config)
    with reporting(as_json) as report:
        import_libraries()
        report.document = found = explained(model, config_if_given(preset, config), length)
        report.console.print(table_of(found))


def explained(model: str, config: SparseAttentionConfig | None, length: int) -> dict[str, Any]:
    """What the command says, as plain data.

    Args:
        config: None takes what the checkpoint says.
    Returns:
        ``model``; ``device``; ``length``; ``modules``, by name with ``class``, ``sparse``, ``why``, ``rules``
        that apply, ``fields`` of the method, and ``prefill`` and ``decode``: ``kernel``, ``is_sparse``,
        ``reasons``, or None where text doesn't reach it; ``unreached``: modules that no rule can reach, by
        name, and why.
    Raises:
        ArgumentError: there is no configuration and the checkpoint isn't sparse.
    """
    import torch

    from modelopt_sparse.models.attention import attention_targets

    from .choosing import Choice, chosen_kernel
    from .deciding import decisions
    from .tracing import empty_model, trace, unreached

    if config is None:
        check_is_sparse(model)
    settings = load_model_config(model)
    with waiting("tracing the model"):
        with blaming(model):
            empty, mode = empty_model(settings)
        targets = attention_targets(empty)
        decided = saved_decisions(empty, targets) if config is None else decisions(config, targets)
        calls = trace(empty, mode, length)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # transformers asks a configuration for the function, so its dense modules call ours as well.
    ours = {id(targets[name].module.config) for name in decided if decided[name].resolved}
    known: dict[Any, Choice] = {}

    def choice(name: str, phase: str) -> dict[str, Any] | None:
        call = getattr(calls, phase).get(name)
        if call is None:
            return None
        if id(targets[name].module.config) not in ours:
            return Choice(OWN, False).to_dict()
        resolved = decided[name].resolved
        key = phase, resolved and (resolved.config, resolved.enabled), _shape_of(call)
        if key not in known:
            known[key] = chosen_kernel(call, resolved, device)
        return known[key].to_dict()

    return {
        "model": model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "length": length,
        "modules": {
            name: {
                "class": target.class_name,
                **decided[name].to_dict(),
                "prefill": choice(name, "prefill"),
                "decode": choice(name, "decode"),
            }
            for name, target in targets.items()
        },
        "unreached": {
            name: f"{cls} doesn't call transformers' attention interface"
            for name, cls in unreached(empty, set(targets)).items()
        },
    }


def saved_decisions(model: PreTrainedModel, targets: dict[str, Target]) -> dict[str, Decision]:
    """What the checkpoint of a model says of each of `targets`, by name. The model is dense afterwards.

    Since its rules were written, modules may have been calibrated, enabled and disabled.

    Raises:
        StateError: what it says doesn't fit the model.
    """
    import modelopt_sparse as mtsa
    from modelopt_sparse.config import Resolved
    from modelopt_sparse.modes.apply import applied_modes
    from modelopt_sparse.module_state import sparse_modules
    from modelopt_sparse.sparse_mode import restore_from_block

    from .deciding import decisions

    restore_from_block(model)
    (mode,) = applied_modes(model)
    assert isinstance(mode.config, mtsa.SparseAttentionConfig)
    saved = {
        name: Resolved(module.method.config, module.enabled)
        for name, module in sparse_modules(model)
    }
    mtsa.unsparsify(model)
    found = {}
    for name, decision in decisions(mode.config, targets).items():
        found[name] = now = replace(decision, resolved=saved.get(name))
        if now.is_sparse != decision.is_sparse:
            why = f"{'enabled' if now.is_sparse else 'disabled'} when the checkpoint was saved"
            found[name] = replace(now, why=why)
    return found


def table_of(found: dict[str, Any]) -> Table:
    """A row a module; what is as in the row above is a ditto mark."""
    calls = f"a prompt of {found['length']} tokens, and a token after it"
    title = f"{found['model']}: {calls}, on {found['device']}"
    table = Table(title=title)
    table.add_column("module", no_wrap=True)
    for header in ("sparse", "why", "prefill", "decode"):
        table.add_column(header, overflow="fold")
    above: tuple[str, ...] = ()
    for name, module in found["modules"].items():
        cells = (
            "yes" if module["sparse"] else "no",
            module["why"],
            _cell(module["prefill"]),
            _cell(module["decode"]),
        )
        table.add_row(name, *(('"',) * len(cells) if cells == above else cells))
        above = cells
    for name, why in found["unreached"].items():
        table.add_row(name, "no", why, "", "")
    return table


def _cell(choice: dict[str, Any] | None) -> str:
    from .choosing import Choice

    return "not called by text" if choice is None else str(Choice(**choice))


def _shape_of(call: Any) -> tuple[Any, ...]:
    """What the choice of a kernel depends on."""
    import torch

    tensors = [(x.shape, x.stride(), x.dtype) for x in (call.q, call.k, call.v)]
    options = {
        name: value.shape if isinstance(value, torch.Tensor) else type(value)
        for name, value in call.options.items()
    }
    return (*tensors, *options.items())

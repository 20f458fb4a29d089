"""``modelopt-sparse explain``: which modules become sparse and why, and which kernels they run here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .loading import blaming, import_libraries, load_model_config
from .options import (
    ConfigOption,
    JsonOption,
    ModelArgument,
    PresetOption,
    check_choice,
    chosen_config,
)
from .reporting import reporting, waiting

if TYPE_CHECKING:
    from modelopt_sparse import SparseAttentionConfig

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

    Takes --preset or --config. Reads the model's config.json alone; no weights are loaded.
    """
    check_choice(preset, config)
    with reporting(as_json) as report:
        import_libraries()
        report.document = found = explained(model, chosen_config(preset, config), length)
        report.console.print(table_of(found))


def explained(model: str, config: SparseAttentionConfig, length: int) -> dict[str, Any]:
    """What the command says, as plain data.

    Returns:
        ``model``; ``device``; ``length``; ``modules``, by name with ``class``, ``sparse``, ``why``, ``rules``
        that apply, ``fields`` of the method, and ``prefill`` and ``decode``: ``kernel``, ``is_sparse``,
        ``reasons``, or None where text doesn't reach it; ``unreached``: modules that no rule can reach, by
        name, and why.
    """
    import torch

    from modelopt_sparse.models.attention import attention_targets

    from .choosing import Choice, chosen_kernel
    from .deciding import decisions
    from .tracing import empty_model, trace, unreached

    settings = load_model_config(model)
    with waiting("tracing the model"):
        with blaming(model):
            empty, mode = empty_model(settings)
        targets = attention_targets(empty)
        decided = decisions(config, targets)
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

"""What people see of a sparse model: tile counts as data and as a table."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from torch import nn

from modelopt_sparse.errors import ArgumentTypeError, describe
from modelopt_sparse.integrations.hf import ATTENTION_NAME
from modelopt_sparse.integrations.hf_paged import PAGED_NAME
from modelopt_sparse.methods.calibrated import CalibratedThreshold
from modelopt_sparse.modes.apply import check_model
from modelopt_sparse.module import SparseAttentionModule
from modelopt_sparse.module_state import sparse_modules
from modelopt_sparse.stats import AttentionStats, PhaseStats


def get_stats(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What each sparse module did since the last reset, as plain data.

    Returns:
        By module name: ``method``; ``enabled``; ``attn_implementation``, other than "modelopt_triton"
        inside of `continuous_batching`, and if it was set to another, which makes the module dense; and for
        ``prefill`` and ``decode`` None (nothing was counted: no call, or no skipping in that phase) or a
        dict of ``calls``; ``visible``, tiles by query head; ``skipped``, the same; ``sparsity``, skipped /
        visible over all heads; ``counted``, for each further threshold its ``threshold`` and ``skipped``,
        the tiles that it would have skipped, by head. Calls that `torch.compile` compiled aren't counted.
    """
    check_model(model)
    return {name: _module_data(module) for name, module in sparse_modules(model)}


def reset_stats(model: nn.Module) -> None:
    """Sets every count of every sparse module to nothing counted."""
    check_model(model)
    for _, module in sparse_modules(model):
        module.stats = AttentionStats()


def print_sparse_attention_summary(model: nn.Module, console: Console | None = None) -> None:
    """Prints a table of the sparse modules: method, parameters, enabled, tiles visited and skipped.

    Args:
        console: where to; standard output by default.

    Raises:
        ArgumentTypeError: not a module, not a console.
    """
    check_model(model)
    if not isinstance(console, Console | None):
        raise ArgumentTypeError(describe("console", repr(console), "a rich.console.Console"))
    (console or Console()).print(summary_table(model))


def summary_table(model: nn.Module) -> Table:
    """The table that `print_sparse_attention_summary` prints."""
    stats = get_stats(model)
    title = f"Sparse attention: {len(stats)} modules of {type(model).__name__}"
    table = Table(title=title, caption="Tiles skipped of tiles visited, by phase")
    table.add_column("module", no_wrap=True)
    table.add_column("method, parameters", overflow="fold")
    table.add_column("enabled")
    table.add_column("prefill", justify="right", no_wrap=True)
    table.add_column("decode", justify="right", no_wrap=True)
    above = None
    for name, module in sparse_modules(model):
        entry, config = stats[name], module.method.config
        table.add_row(
            name,
            '"' if config == above else _method_cell(module),
            _enabled_cell(module),
            _phase_cell([entry["prefill"]]),
            _phase_cell([entry["decode"]]),
        )
        above = config
    if len(stats) > 1:
        table.add_section()
        phases = ([entry[phase] for entry in stats.values()] for phase in ("prefill", "decode"))
        table.add_row("all", "", "", *map(_phase_cell, phases))
    return table


def _module_data(module: SparseAttentionModule) -> dict[str, Any]:
    plan, stats = module.method.plan(), module.stats
    config: Any = module.config
    return {
        "method": module.method.config.method,
        "enabled": module.enabled,
        "attn_implementation": config._attn_implementation,
        "prefill": _phase_data(stats.prefill, plan.skip.count_thresholds if plan.skip else ()),
        "decode": _phase_data(
            stats.decode, plan.skip_decode.count_thresholds if plan.skip_decode else ()
        ),
    }


def _phase_data(stats: PhaseStats, thresholds: tuple[float, ...]) -> dict[str, Any] | None:
    if stats.counts is None:
        return None
    visible = stats.counts.visible.tolist()
    skipped, *counted = stats.counts.skipped.tolist()
    return {
        "calls": stats.calls,
        "visible": visible,
        "skipped": skipped,
        "sparsity": sum(skipped) / max(sum(visible), 1),
        "counted": [
            {"threshold": threshold, "skipped": tiles}
            for threshold, tiles in zip(thresholds, counted, strict=True)
        ],
    }


def _enabled_cell(module: SparseAttentionModule) -> str:
    config: Any = module.config
    if config._attn_implementation not in (ATTENTION_NAME, PAGED_NAME):
        return f"no: the model runs {config._attn_implementation}"
    return "yes" if module.enabled else "no"


def _phase_cell(phases: list[dict[str, Any] | None]) -> str:
    counted = [data for data in phases if data is not None]
    if not counted:
        return "-"
    visible = sum(sum(data["visible"]) for data in counted)
    skipped = sum(sum(data["skipped"]) for data in counted)
    return f"{skipped / max(visible, 1):.1%}\nof {visible:,}"


def _short(value: Any) -> Any:
    """Plain data, but for calibrated thresholds, whose tables are long."""
    if isinstance(value, CalibratedThreshold):
        return str(value)
    if isinstance(value, BaseModel):
        return {name: _short(field) for name, field in value}
    return [_short(entry) for entry in value] if isinstance(value, tuple) else value


def _method_cell(module: SparseAttentionModule) -> str:
    """The method's name, then its parameters."""
    fields = _short(module.method.config)
    method = fields.pop("method")
    plan = module.method.plan()
    if fields.get("min_context") == "auto" and (part := plan.skip or plan.skip_decode):
        fields["min_context"] = f"auto, {part.min_context}"
    return "\n".join([method, *(f"{name}={value}" for name, value in fields.items())])

"""A comparison as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

if TYPE_CHECKING:
    from .results import Comparison, DroppedMass, Estimate, PhaseComparison


def comparison_table(comparison: Comparison) -> Group:
    """Two tables: what the tokens say, and what each module does."""
    return Group(_tokens(comparison), _modules(comparison))


def _tokens(comparison: Comparison) -> Table:
    number, plural = comparison.sequences, "s" if comparison.sequences > 1 else ""
    title = f"Dense against sparse: {comparison.tokens:,} tokens of {number:,} sequence{plural}"
    table = Table(title=title, caption=token_caption(comparison))
    for index, heading in enumerate(token_headings(comparison)):
        table.add_column(heading, justify="right" if index else "left")
    for row in token_rows(comparison):
        table.add_row(*row)
    return table


def token_caption(comparison: Comparison) -> str:
    """Over what the intervals of `token_rows` are."""
    of = "sequences" if comparison.sequences > 1 else "blocks of the sequence"
    return f"Intervals over {comparison.clusters:,} {of}, last one over tokens"


def token_headings(comparison: Comparison) -> tuple[str, ...]:
    """Those of `token_rows`."""
    return "next token", "mean", f"{100 * comparison.confidence:.4g} % interval"


def token_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """What the tokens say, in words."""
    return [
        ("bits per token, dense", f"{comparison.dense_bits:.4f}", ""),
        ("bits per token, sparse", f"{comparison.sparse_bits:.4f}", ""),
        ("difference", *_estimate(comparison.bits_difference, "+.4f")),
        ("KL(dense || sparse), bits", *_estimate(comparison.kl_bits, ".4g")),
        ("same most likely token", *_estimate(comparison.agreement, ".2%")),
    ]


def _modules(comparison: Comparison) -> Table:
    overall = "no tiles were counted"
    if comparison.sparsity is not None:
        overall = f"{comparison.sparsity:.1%} of tiles skipped"
    caption = (
        "Above: the error of all heads, and the mean dropped mass. "
        "Below: the error of the worst head, and the largest mass of a row"
    )
    table = Table(title=f"{len(comparison.modules)} modules, {overall}", caption=caption)
    table.add_column("module", overflow="fold")
    for name in ("skipped", "error", "dropped mass", "at most"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, module in comparison.modules.items():
        for phase, found in (("prefill", module.prefill), ("decode", module.decode)):
            if found is not None:
                table.add_row(f"{name}\n{phase}", *_cells(found))
    return table


def _cells(found: PhaseComparison) -> tuple[str, ...]:
    error = found.relative_error
    return (
        "-" if found.sparsity is None else f"{found.sparsity.overall:.1%}",
        f"{error.overall:.2%}\n{max(error.heads):.2%}",
        _mass(found.dropped_mass),
        _mass(found.dropped_mass_bound),
    )


def _mass(mass: DroppedMass | None) -> str:
    return "-" if mass is None else f"{mass.mean.overall:.2%}\n{mass.max.overall:.2%}"


def _estimate(estimate: Estimate, form: str) -> tuple[str, str]:
    if estimate.interval is None:
        return f"{estimate.value:{form}}", "-"
    low, high = estimate.interval
    return f"{estimate.value:{form}}", f"{low:{form}} to {high:{form}}"

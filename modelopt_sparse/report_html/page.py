"""The page: what the model does, what that costs, and what was measured elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element

from torch import nn

from modelopt_sparse.calibration.check_results import CalibrationCheck
from modelopt_sparse.faithfulness.results import Comparison, PhaseComparison
from modelopt_sparse.module_state import module_states
from modelopt_sparse.version import __version__

from .elements import document, el
from .heat_map import heat_map
from .sections import calibration, quality, speed
from .style import STYLE

if TYPE_CHECKING:
    from modelopt_sparse.bench.run import Row


def html_report(
    model: nn.Module,
    name: str,
    comparison: Comparison,
    *,
    decoded: Comparison | None = None,
    check: CalibrationCheck | None = None,
    bench: tuple[Mapping[str, Any], Sequence[Row]] | None = None,
) -> str:
    """One HTML file that asks for no other, on a sparse model.

    Args:
        model: as it was when the rest was measured.
        name: what to call it.
        comparison: from `modelopt_sparse.compare`.
        decoded: the same with ``num_decode_tokens``; without it nothing is shown of decode.
        check: from `modelopt_sparse.check_calibration`, of a calibrated model.
        bench: from `modelopt_sparse.bench.report.load`.
    """
    states = json.dumps(module_states(model), indent=2)
    skipped = "no tiles were counted"
    if comparison.sparsity is not None:
        skipped = f"{comparison.sparsity:.1%} of tiles skipped"
    bits = f"{comparison.dense_bits:.4f} bits per token dense, {comparison.sparse_bits:.4f} sparse"
    said = f"{comparison.tokens:,} tokens, {len(comparison.modules)} modules: {skipped}, {bits}."
    return document(
        f"Sparse attention: {name}",
        STYLE,
        el("h1", f"Sparse attention: {name}"),
        el("p", said),
        el("h2", "Quality"),
        *quality(comparison),
        *([] if decoded is None else [el("h3", "Of tokens that are decoded"), *quality(decoded)]),
        el("h2", "By layer and head"),
        el("div", *_heat_maps(comparison, decoded), class_="maps"),
        *calibration(model, check),
        *([] if bench is None else speed(*bench)),
        el("h2", "Configuration"),
        el("details", el("summary", "What each module does"), el("pre", states)),
        el("footer", el("p", f"modelopt_sparse {__version__}")),
    )


def _heat_maps(comparison: Comparison, decoded: Comparison | None) -> list[Element]:
    """Tiles skipped, and errors, by phase; the same shade is the same share in both phases."""
    in_decode = {} if decoded is None else decoded.modules
    phases: dict[str, dict[str, PhaseComparison | None]] = {
        "prefill": {name: module.prefill for name, module in comparison.modules.items()},
        "decode": {name: module.decode for name, module in in_decode.items()},
    }
    skipped = {
        f"Tiles skipped in {phase}": {
            name: found.sparsity.heads
            for name, found in modules.items()
            if found is not None and found.sparsity is not None
        }
        for phase, modules in phases.items()
    }
    errors = {
        f"Error of the attention output in {phase}": {
            name: found.relative_error.heads for name, found in modules.items() if found is not None
        }
        for phase, modules in phases.items()
    }
    return [
        heat_map(title, shares, unit, _largest(maps))
        for maps, unit in ((skipped, "of visible tiles"), (errors, "of the dense output's norm"))
        for title, shares in maps.items()
        if shares
    ]


def _largest(maps: Mapping[str, Mapping[str, Sequence[float]]]) -> float:
    return max(x for shares in maps.values() for row in shares.values() for x in row)

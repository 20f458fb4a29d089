"""A model measured dense and sparse, and dense again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .heads import skipped_by_head
from .heads import table_of as heads_table
from .loading import calibration_prompts
from .reporting import progress

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor
    from transformers import PreTrainedModel

    from modelopt_sparse import SparseAttentionConfig


@dataclass(frozen=True)
class Measure:
    """A number that is measured in pieces, whose mean it is.

    Args:
        pieces: each measures the model as it is then.
        spec: how to print it, as in an f-string.
    """

    pieces: Sequence[Callable[[], float]]
    spec: str = ".4f"


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Args:
        dense, sparse: each measure's mean, by its name.
        stats: as `modelopt_sparse.get_stats`, of the sparse measurement.
        summary: of the sparse model, as a table.
        is_restored: whether the model's logits are, to the bit, what they were before.
    """

    dense: dict[str, float]
    sparse: dict[str, float]
    stats: dict[str, dict[str, Any]]
    summary: Table
    is_restored: bool

    def show(self, console: Console, measures: Mapping[str, Measure], title: str) -> None:
        """Prints what was skipped and what it cost."""
        console.print(self.summary)
        shares = skipped_by_head(self.stats)
        if shares is not None:
            console.print(heads_table(shares))
        table = Table(title=title)
        for header in ("", "dense", "sparse"):
            table.add_column(header, justify="right" if header else "left")
        for name, measure in measures.items():
            values = self.dense[name], self.sparse[name]
            table.add_row(name, *(format(value, measure.spec) for value in values))
        console.print(table)
        same = "equal to the bit" if self.is_restored else "DIFFER"
        console.print(f"unsparsify: the dense model is back, logits {same}")


def compare(
    model: PreTrainedModel,
    config: SparseAttentionConfig,
    measures: Mapping[str, Measure],
    probe: Tensor,
) -> Comparison:
    """Measures the model dense and sparse, and makes it dense again.

    Args:
        probe: tokens [1, n] whose logits tell whether the model is the same afterwards.
    """
    import torch

    import modelopt_sparse as mtsa
    from modelopt_sparse.report import summary_table

    @torch.no_grad()
    def logits() -> Tensor:
        found: Tensor = model(probe).logits
        return found

    count = sum(len(measure.pieces) for measure in measures.values())
    with progress() as bar:
        task = bar.add_task("dense ", total=2 * count)

        def measure_all() -> dict[str, float]:
            means = {}
            for name, measure in measures.items():
                total = 0.0
                for piece in measure.pieces:
                    total += piece()
                    bar.advance(task)
                means[name] = total / len(measure.pieces)
            return means

        before, dense = logits(), measure_all()
        mtsa.sparsify(model, config, calibration_prompts(model, config, bar))
        bar.update(task, description="sparse")
        sparse = measure_all()
    stats, summary = mtsa.get_stats(model), summary_table(model)
    mtsa.unsparsify(model)
    return Comparison(dense, sparse, stats, summary, torch.equal(logits(), before))

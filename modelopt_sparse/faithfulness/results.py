"""What a comparison found, as plain data."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from modelopt_sparse.errors import ArgumentTypeError, describe

from .table import comparison_table


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True)


class Estimate(_Data):
    """A mean over tokens with its confidence interval; None where there are too few tokens for one."""

    value: float
    interval: tuple[float, float] | None


class ByHead(_Data):
    """A number of all query heads together, and of each."""

    overall: float
    heads: tuple[float, ...]


class DroppedMass(_Data):
    """Shares of a row's softmax weight, over the query rows that see a key: their mean and the largest."""

    mean: ByHead
    max: ByHead


class PhaseComparison(_Data):
    """One module's calls in one phase.

    Args:
        rows: query rows that see a key.
        relative_error: norm of (sparse - dense) over norm of dense attention output, before the output
            projection.
        sparsity: tiles skipped / visible in the sparse pass; None where none were counted.
        dropped_mass: the weight that lay in skipped tiles, of what N:M left; None where the method skips no
            tiles in this phase.
        dropped_mass_bound: the bound that kernels have of it for free.
    """

    rows: int
    relative_error: ByHead
    sparsity: ByHead | None
    dropped_mass: DroppedMass | None
    dropped_mass_bound: DroppedMass | None


class ModuleComparison(_Data):
    """One module, by phase; None for a phase in which it was not called."""

    prefill: PhaseComparison | None
    decode: PhaseComparison | None


class Comparison(_Data):
    """How far sparse attention takes a model from dense attention: what `compare` returns.

    Args:
        tokens: next tokens that were predicted and scored.
        sequences: those they are of.
        clusters: groups of tokens that intervals take for independent: the sequences, or the blocks of one.
        confidence: that of the intervals.
        dense_bits, sparse_bits: -log2 of the probability given to the next token, the mean.
        bits_difference: sparse minus dense.
        agreement: the share of tokens for which both have the same most likely next token.
        kl_bits: KL(dense || sparse) of the next token's distributions, in bits, the mean.
        sparsity: tiles skipped / visible in the sparse pass, all modules; None where none were counted.
        modules: what each enabled sparse module did, by its dotted name.
    """

    tokens: int
    sequences: int
    clusters: int
    confidence: float
    dense_bits: float
    sparse_bits: float
    bits_difference: Estimate
    agreement: Estimate
    kl_bits: Estimate
    sparsity: float | None
    modules: dict[str, ModuleComparison]

    def to_dict(self) -> dict[str, Any]:
        """The same as dicts, lists and numbers, as JSON takes them."""
        return self.model_dump(mode="json")

    def print(self, console: Console | None = None) -> None:
        """Prints two tables: of the tokens, and of the modules.

        Args:
            console: where to; standard output by default.

        Raises:
            ArgumentTypeError: not a console.
        """
        if not isinstance(console, Console | None):
            raise ArgumentTypeError(describe("console", repr(console), "a rich.console.Console"))
        (console or Console()).print(comparison_table(self))

"""Thresholds that were calibrated: a share of tiles to skip, and what lambda that takes, by length."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from modelopt_sparse.kernels.scale_factors import ScaleFactors

from .base import SparseMethodConfig
from .fields import MAX_HEADS, MAX_TOKENS, MinContext, fraction, fraction_or_none, not_taken

PhaseName = Literal["prefill", "decode"]

PHASES: tuple[PhaseName, ...] = get_args(PhaseName)
"""Their names."""

Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False, strict=False)]
"""A share of tiles: 0 <= value < 1."""

FORMULA = "a * exp(b * target_sparsity)"
"""The scale factor of a share of tiles, as serving engines read it."""

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Lengths = Annotated[
    tuple[Annotated[int, Field(ge=1, le=MAX_TOKENS)], ...],
    Field(min_length=1, max_length=1000, fail_fast=True),
]
# By target, and there one for all heads or one for each.
_Heads = Annotated[tuple[_Positive, ...], Field(min_length=1, max_length=MAX_HEADS, fail_fast=True)]
_Row = Annotated[tuple[_Positive | _Heads, ...], Field(max_length=1000, fail_fast=True)]
_Factors = Annotated[tuple[_Row, ...], Field(max_length=1000, fail_fast=True)]


class ScaleFormula(BaseModel):
    """``lambda = a * exp(b * target_sparsity) / keys``, for every length.

    Args:
        a, b: its coefficients.
        worst_error: by how many points of sparsity it is off at most, where it was fitted.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    a: _Positive
    b: Annotated[float, Field(allow_inf_nan=False)]
    worst_error: Annotated[float, Field(ge=0, le=100)] | None = None

    def factor(self, target: float) -> float:
        """The scale factor for a share of tiles, as far as a float goes."""
        return math.exp(min(math.log(self.a) + self.b * target, 700.0))


class ScaleTable(BaseModel):
    """Scale factors by length and share, as they were measured.

    Args:
        lengths: numbers of keys, rising.
        targets: shares of tiles, rising, above 0.
        factors: for each length, by target, a scale factor for all heads or one for each; none falls where
            the share rises.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lengths: _Lengths
    targets: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...],
        Field(min_length=1, max_length=1000, fail_fast=True),
    ]
    factors: _Factors

    @model_validator(mode="after")
    def _is_a_table(self) -> ScaleTable:
        for name in ("lengths", "targets"):
            if any(after <= before for before, after in pairwise(getattr(self, name))):
                raise not_taken("rising", f"{name} that rise")
        if [len(row) for row in self.factors] != [len(self.targets)] * len(self.lengths):
            raise not_taken("table", "a row of factors for each length, with one for each target")
        cells = [_by_head(cell) for row in self.factors for cell in row]
        if len({len(cell) for cell in cells}) > 1 or not all(cells):
            raise not_taken("table", "as many heads in every entry")
        rows = [[_by_head(cell) for cell in row] for row in self.factors]
        if any(y < x for row in rows for a, b in pairwise(row) for x, y in zip(a, b, strict=True)):
            raise not_taken("table", "factors that don't fall where the share rises")
        return self

    def factors_at(self, target: float) -> tuple[float | tuple[float, ...], ...]:
        """The factors of each length for a share above 0.

        Between two targets log(factor) is linear; before the first and after the last it stays.
        """
        return tuple(self._factors_at(target, row) for row in self.factors)

    def _factors_at(
        self, target: float, row: tuple[float | tuple[float, ...], ...]
    ) -> float | tuple[float, ...]:
        by_head = np.log([_by_head(cell) for cell in row]).T  # [heads, targets]
        found = tuple(math.exp(np.interp(target, self.targets, logs)) for logs in by_head)
        return found if isinstance(row[0], tuple) else found[0]


class CalibratedThreshold(BaseModel):
    """A lambda that follows from the share of tiles to skip and from the sequence's own number of keys.

    The table says it where there is one, else the formula.

    Args:
        target_sparsity: the share of visible tiles to skip; 0 is dense.
        formula: for engines that read one.
        table: what was measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    target_sparsity: Share
    formula: ScaleFormula | None = None
    table: ScaleTable | None = None

    @model_validator(mode="after")
    def _says_something(self) -> CalibratedThreshold:
        if self.formula is None and self.table is None:
            raise not_taken("calibrated", "a formula, a table, or both")
        return self

    def at(self, target: float) -> CalibratedThreshold:
        """The same, for another share of tiles.

        Raises:
            pydantic.ValidationError: it isn't one.
        """
        return CalibratedThreshold(target_sparsity=target, formula=self.formula, table=self.table)

    def __str__(self) -> str:
        """In few words: the share, and what says how it is reached."""
        said = [f"{self.target_sparsity:.1%} of tiles"]
        if self.table is not None:
            said.append(f"table for {self.table.lengths[0]} to {self.table.lengths[-1]} keys")
        if self.formula is not None:
            said.append(f"{self.formula.a:g} * exp({self.formula.b:g} * share) / keys")
        return "; ".join(said)

    @cached_property
    def scale_factor(self) -> ScaleFactors | None:
        """As a plan takes it; None for dense."""
        if not self.target_sparsity:
            return None
        if self.table is not None:
            return ScaleFactors(self.table.lengths, self.table.factors_at(self.target_sparsity))
        assert self.formula is not None
        return ScaleFactors((1,), (self.formula.factor(self.target_sparsity),))


class SkipSoftmaxConfig(SparseMethodConfig):
    """Base of the configurations whose thresholds can be calibrated.

    Args:
        min_context: sequences of fewer keys are dense, in both phases. "auto": where skipping doesn't pay.
    """

    min_context: MinContext = 0

    @abstractmethod
    def threshold(self, phase: PhaseName) -> float | CalibratedThreshold | None:
        """What the phase has now; None or 0 is dense."""

    @abstractmethod
    def with_thresholds(
        self, thresholds: Mapping[PhaseName, float | CalibratedThreshold], min_context: MinContext
    ) -> SkipSoftmaxConfig:
        """The same, with these thresholds in place of those of their phases."""


def in_plan(threshold: float | CalibratedThreshold | None) -> dict[str, Any]:
    """A threshold as the arguments of a plan's part that say it."""
    if isinstance(threshold, CalibratedThreshold):
        return {"threshold": None, "scale_factor": threshold.scale_factor}
    return {"threshold": threshold or None, "scale_factor": None}


def _or_calibrated(number: Callable[[Any], float | None]) -> BeforeValidator:
    """Takes calibrated thresholds, mappings that describe one, and what `number` takes."""

    def check(value: Any) -> Any:
        if isinstance(value, CalibratedThreshold):
            return value
        if not isinstance(value, Mapping):
            return number(value)
        try:
            return CalibratedThreshold.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            takes = f"a calibrated threshold; of this one, {place}: {first['msg']}"
            raise not_taken("calibrated", takes) from None

    return BeforeValidator(check)


Threshold = Annotated[float | CalibratedThreshold, _or_calibrated(fraction)]
"""A lambda, or one that was calibrated."""

OptionalThreshold = Annotated[float | CalibratedThreshold | None, _or_calibrated(fraction_or_none)]
"""A lambda, one that was calibrated, or None, which is dense."""


def _by_head(cell: float | tuple[float, ...]) -> tuple[float, ...]:
    return cell if isinstance(cell, tuple) else (cell,)

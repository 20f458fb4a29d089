"""Skip-softmax with a list of thresholds per phase and a decision tile that can be chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from modelopt_sparse.kernels.types import Plan, SkipSoftmax

from .base import SparseMethod
from .calibrated import CalibratedThreshold, PhaseName, SkipSoftmaxConfig, Threshold, in_plan
from .decode_tile import DecodeTileFields, in_decode
from .fields import MinContext, TileSize, least_context, not_taken
from .registry import register_sparse_method


def _lambdas(value: Any) -> Any:
    if not isinstance(value, list | tuple) or not value:
        raise not_taken("fractions", "a non-empty list of fractions")
    if any(isinstance(x, Mapping | CalibratedThreshold) for x in value[1:]):
        raise not_taken("fractions", "fractions after the first: calibrated ones aren't counted")
    return tuple(value)


Thresholds = Annotated[tuple[Threshold, ...], BeforeValidator(_lambdas)]
"""A non-empty list or tuple of lambdas, the first of which may be a calibrated one."""


class PhaseThresholds(BaseModel):
    """Lambdas by phase: the first applies, the others are only counted.

    Args:
        prefill, decode: a non-empty list of fractions from 0 to 1; the first may be what
            `modelopt_sparse.calibrate` found. A phase that is None or left out is dense; at least one is
            given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefill: Thresholds | None = None
    decode: Thresholds | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> PhaseThresholds:
        if self.prefill is None and self.decode is None:
            raise not_taken("thresholds", _TAKES)
        return self


_TAKES = '{"prefill": [...], "decode": [...]}, one of them or both, with fractions from 0 to 1'


def _by_phase(value: Any) -> Any:
    if isinstance(value, PhaseThresholds):
        return value
    if not isinstance(value, Mapping) or not value or set(value) - {"prefill", "decode"}:
        raise not_taken("thresholds", _TAKES)
    return dict(value)


class FlashSkipSoftmaxConfig(DecodeTileFields, SkipSoftmaxConfig):
    """Configuration of `FlashSkipSoftmax`.

    Args:
        thresholds: ``{"prefill": [...], "decode": [...]}``: per phase a non-empty list of lambdas.
            The first applies, the others are only counted. A first value of 0, and a phase that is
            left out, is dense.
        br, bc: rows and keys of the prefill decision tile: 16, 32, 64 or 128. Part of the result.
    """

    abandoned: ClassVar[Mapping[str, str]] = {
        "threshold": "thresholds",
        "skip_softmax_threshold": "thresholds",
        "skip_softmax_decode_threshold": "thresholds",
        "block_rows": "br",
        "block_keys": "bc",
    }

    method: Literal["flash_skip_softmax"] = "flash_skip_softmax"
    backend: Literal["triton", "pytorch"] = "pytorch"
    thresholds: Annotated[PhaseThresholds, BeforeValidator(_by_phase)] = PhaseThresholds(
        prefill=(0.1,), decode=(0.01,)
    )
    br: TileSize = 64
    bc: TileSize = 128

    def threshold(self, phase: PhaseName) -> float | CalibratedThreshold | None:
        """What the phase has now; None or 0 is dense."""
        lambdas = getattr(self.thresholds, phase)
        return lambdas[0] if lambdas else None

    def with_thresholds(
        self, thresholds: Mapping[PhaseName, float | CalibratedThreshold], min_context: MinContext
    ) -> FlashSkipSoftmaxConfig:
        """The same, with these thresholds in place of the first of their phases."""
        changed: dict[str, Any] = {
            phase: (threshold, *(getattr(self.thresholds, phase) or ())[1:])
            for phase, threshold in thresholds.items()
        }
        whole = self.thresholds.model_copy(update=changed)
        return self.model_validate({**dict(self), "thresholds": whole, "min_context": min_context})


@register_sparse_method
class FlashSkipSoftmax(SparseMethod[FlashSkipSoftmaxConfig]):
    """Leaves out score tiles whose every row lies far below its running maximum.

    Source: BLASST (arXiv 2512.12087).
    """

    Config = FlashSkipSoftmaxConfig

    def plan(self) -> Plan:
        """Skipping, or counting only, in the phases that have lambdas for it."""
        config = self.config
        prefill, decode = map(_split, (config.thresholds.prefill, config.thresholds.decode))
        least = least_context(config.min_context)
        skip = None
        if any(prefill.values()):
            skip = SkipSoftmax(
                **prefill, block_rows=config.br, block_keys=config.bc, min_context=least
            )
        return Plan(skip=skip, skip_decode=in_decode(config, decode, least))


def _split(lambdas: tuple[float | CalibratedThreshold, ...] | None) -> dict[str, Any]:
    """The lambda in force, and those that are only counted, as the arguments of a plan's part."""
    first, *counted = lambdas or (None,)
    return {**in_plan(first), "count_thresholds": tuple(counted)}

"""Skip-softmax with one threshold per phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from modelopt_sparse.kernels.types import Plan, SkipSoftmax

from .base import SparseMethod
from .calibrated import (
    CalibratedThreshold,
    OptionalThreshold,
    PhaseName,
    SkipSoftmaxConfig,
    in_plan,
)
from .decode_tile import DecodeTileFields, in_decode
from .fields import MinContext, least_context
from .registry import register_sparse_method


class TritonSkipFields(DecodeTileFields, SkipSoftmaxConfig):
    """What to skip, by phase.

    Args:
        skip_softmax_threshold: lambda of the prefill phase: a fraction from 0 to 1, or what
            `modelopt_sparse.calibrate` found. None or 0 is dense.
        skip_softmax_decode_threshold: lambda of the decode phase, likewise.
    """

    abandoned: ClassVar[Mapping[str, str]] = {
        "threshold": "skip_softmax_threshold",
        "thresholds": "skip_softmax_threshold",
        "decode_threshold": "skip_softmax_decode_threshold",
    }

    skip_softmax_threshold: OptionalThreshold = 0.1
    skip_softmax_decode_threshold: OptionalThreshold = None

    def threshold(self, phase: PhaseName) -> float | CalibratedThreshold | None:
        """What the phase has now; None or 0 is dense."""
        is_prefill = phase == "prefill"
        return self.skip_softmax_threshold if is_prefill else self.skip_softmax_decode_threshold

    def with_thresholds(
        self, thresholds: Mapping[PhaseName, float | CalibratedThreshold], min_context: MinContext
    ) -> Self:
        """The same, with these thresholds in place of those of their phases."""
        fields = {"prefill": "skip_softmax_threshold", "decode": "skip_softmax_decode_threshold"}
        changed = {fields[phase]: threshold for phase, threshold in thresholds.items()}
        return self.model_validate({**dict(self), **changed, "min_context": min_context})


class TritonSkipSoftmaxConfig(TritonSkipFields):
    """Configuration of `TritonSkipSoftmax`: `TritonSkipFields`."""

    method: Literal["triton_skip_softmax"] = "triton_skip_softmax"


@register_sparse_method
class TritonSkipSoftmax(SparseMethod[TritonSkipSoftmaxConfig]):
    """Leaves out score tiles whose every row lies far below its running maximum.

    Tiles of 64 rows x 128 keys decide in prefill.

    Source: BLASST (arXiv 2512.12087).
    """

    Config = TritonSkipSoftmaxConfig

    def plan(self) -> Plan:
        """Skipping in the phases that have a threshold above 0."""
        return skip_plan(self.config)


def skip_plan(config: TritonSkipFields) -> Plan:
    """What these fields say, as a plan."""
    prefill, decode = map(
        in_plan, (config.skip_softmax_threshold, config.skip_softmax_decode_threshold)
    )
    least = least_context(config.min_context)
    skip = None
    if any(prefill.values()):
        skip = SkipSoftmax(**prefill, block_rows=64, block_keys=128, min_context=least)
    return Plan(skip=skip, skip_decode=in_decode(config, decode, least))

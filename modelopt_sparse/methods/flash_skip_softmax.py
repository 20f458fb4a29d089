"""Skip-softmax with a list of thresholds per phase and a decision tile that can be chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from modelopt_sparse.kernels.types import Plan, SkipSoftmax, SkipSoftmaxDecode

from .base import SparseMethod, SparseMethodConfig
from .fields import Fractions, MinContext, OptionalHeads, TileSize, least_context, not_taken
from .registry import register_sparse_method


class PhaseThresholds(BaseModel):
    """Lambdas by phase: the first applies, the others are only counted.

    Args:
        prefill, decode: a non-empty list of fractions from 0 to 1. A phase that is None or left
            out is dense; at least one is given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefill: Fractions | None = None
    decode: Fractions | None = None

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


class FlashSkipSoftmaxConfig(SparseMethodConfig):
    """Configuration of `FlashSkipSoftmax`.

    Args:
        thresholds: ``{"prefill": [...], "decode": [...]}``: per phase a non-empty list of lambdas.
            The first applies, the others are only counted. A first value of 0, and a phase that is
            left out, is dense.
        br, bc: rows and keys of the prefill decision tile: 16, 32, 64 or 128. Part of the result.
        decode_block_keys: keys of a decision tile in decode: 16, 32, 64 or 128. Part of the result.
        decode_vote_heads: query heads that decide together in decode, a divisor of those that share a KV
            head. None: all of these. Part of the result.
        min_context: sequences of fewer keys are dense, in both phases. "auto": where skipping doesn't pay.
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
        prefill=(1e-3,), decode=(1e-4,)
    )
    br: TileSize = 64
    bc: TileSize = 128
    decode_block_keys: TileSize = 64
    decode_vote_heads: OptionalHeads = None
    min_context: MinContext = 0


@register_sparse_method
class FlashSkipSoftmax(SparseMethod[FlashSkipSoftmaxConfig]):
    """Leaves out score tiles whose every row lies far below its running maximum.

    Source: BLASST (arXiv 2512.12087).
    """

    Config = FlashSkipSoftmaxConfig

    def plan(self) -> Plan:
        """Skipping, or counting only, in the phases that have lambdas for it."""
        config = self.config
        prefill, counted = _split(config.thresholds.prefill)
        decode, decode_counted = _split(config.thresholds.decode)
        least = least_context(config.min_context)
        skip = in_decode = None
        if prefill or counted:
            skip = SkipSoftmax(prefill, config.br, config.bc, counted, min_context=least)
        if decode or decode_counted:
            in_decode = SkipSoftmaxDecode(
                decode,
                config.decode_block_keys,
                vote_heads=config.decode_vote_heads,
                count_thresholds=decode_counted,
                min_context=least,
            )
        return Plan(skip=skip, skip_decode=in_decode)


def _split(lambdas: tuple[float, ...] | None) -> tuple[float | None, tuple[float, ...]]:
    """The lambda in force, None for dense, and those that are only counted."""
    return (lambdas[0] or None, lambdas[1:]) if lambdas else (None, ())

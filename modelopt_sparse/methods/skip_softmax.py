"""Skip-softmax with one fixed threshold per phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from modelopt_sparse.kernels.types import Plan, SkipSoftmax, SkipSoftmaxDecode

from .base import SparseMethod, SparseMethodConfig
from .fields import MinContext, OptionalFraction, OptionalHeads, TileSize, least_context
from .registry import register_sparse_method


class TritonSkipSoftmaxConfig(SparseMethodConfig):
    """Configuration of `TritonSkipSoftmax`.

    Args:
        skip_softmax_threshold: lambda of the prefill phase, a fraction from 0 to 1. None or 0 is
            dense.
        skip_softmax_decode_threshold: lambda of the decode phase. None or 0 is dense.
        decode_block_keys: keys of a decision tile in decode: 16, 32, 64 or 128. Part of the result.
        decode_vote_heads: query heads that decide together in decode, a divisor of those that share a KV
            head. None: all of these. Part of the result.
        min_context: sequences of fewer keys are dense, in both phases. "auto": where skipping doesn't pay.
    """

    abandoned: ClassVar[Mapping[str, str]] = {
        "threshold": "skip_softmax_threshold",
        "thresholds": "skip_softmax_threshold",
        "decode_threshold": "skip_softmax_decode_threshold",
    }

    method: Literal["triton_skip_softmax"] = "triton_skip_softmax"
    skip_softmax_threshold: OptionalFraction = 0.1
    skip_softmax_decode_threshold: OptionalFraction = None
    decode_block_keys: TileSize = 64
    decode_vote_heads: OptionalHeads = None
    min_context: MinContext = 0


@register_sparse_method
class TritonSkipSoftmax(SparseMethod[TritonSkipSoftmaxConfig]):
    """Leaves out score tiles whose every row lies far below its running maximum.

    Tiles of 64 rows x 128 keys decide in prefill.

    Source: BLASST (arXiv 2512.12087).
    """

    Config = TritonSkipSoftmaxConfig

    def plan(self) -> Plan:
        """Skipping in the phases that have a threshold above 0."""
        config = self.config
        prefill, decode = config.skip_softmax_threshold, config.skip_softmax_decode_threshold
        least = least_context(config.min_context)
        skip = in_decode = None
        if prefill:
            skip = SkipSoftmax(prefill, block_rows=64, block_keys=128, min_context=least)
        if decode:
            in_decode = SkipSoftmaxDecode(
                decode,
                config.decode_block_keys,
                vote_heads=config.decode_vote_heads,
                min_context=least,
            )
        return Plan(skip=skip, skip_decode=in_decode)

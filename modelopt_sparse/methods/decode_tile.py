"""How skip-softmax decides in decode, for the methods that do."""

from __future__ import annotations

from typing import Annotated, Any

from modelopt_sparse.kernels.types import SkipSoftmaxDecode

from .base import SparseMethodConfig
from .fields import OptionalHeads, TileSize, one_of

SegmentSize = Annotated[int, one_of(*(2**power for power in range(7, 17)))]
"""Keys of a segment: a power of two from 128 to 65536, so that decision tiles fit."""


class DecodeTileFields(SparseMethodConfig):
    """What decides together in decode.

    Args:
        decode_block_keys: keys of a decision tile in decode: 16, 32, 64 or 128. Part of the result.
        decode_segment_keys: keys of a segment in decode, which decides by itself: a power of two from 128 to
            65536. One sequence is shared by as many programs as it has segments, so shorter ones suit few
            sequences, and skip a little less. Part of the result.
        decode_vote_heads: query heads that decide together in decode, a divisor of those that share a KV
            head. None: all of these. Part of the result.
    """

    decode_block_keys: TileSize = 64
    decode_segment_keys: SegmentSize = 4096
    decode_vote_heads: OptionalHeads = None


def in_decode(
    config: DecodeTileFields, threshold: dict[str, Any], least: int
) -> SkipSoftmaxDecode | None:
    """The plan's part for decode; None where nothing is skipped or counted.

    Args:
        threshold: the arguments that say lambda. least: keys of the shortest sequence that skips.
    """
    if not any(threshold.values()):
        return None
    return SkipSoftmaxDecode(
        **threshold,
        block_keys=config.decode_block_keys,
        segment_keys=config.decode_segment_keys,
        vote_heads=config.decode_vote_heads,
        min_context=least,
    )

"""Tiles of the Hopper prefill kernel, and how its warps share registers."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental.gluon import language as gl

# A warpgroup's rows and the keys that it visits together: a decision tile.
ROWS = gl.constexpr(64)
KEYS = gl.constexpr(128)
# Channels of a box: 128 bytes, the widest swizzle.
CHANNELS = gl.constexpr(64)
# Warps of a warpgroup.
WARPS = gl.constexpr(4)
# Registers of a thread: at first, of one that attends, and of one that fetches. Two warpgroups attend, and a
# third is set aside for the warp that fetches: 65,536 registers in all.
REGISTERS = 168
ATTEND_REGISTERS = gl.constexpr(232)
FETCH_REGISTERS = gl.constexpr(40)


class Buffers(NamedTuple):
    """Shared memory, in pieces of 64 channels.

    Args:
        q: [2 * pieces, 64, 64], those of the first warpgroup first.
        k: [stages * pieces, 128, 64]. v: [stages, 128, Dv].
    """

    q: Any
    k: Any
    v: Any


class Barriers(NamedTuple):
    """Who waits for whom.

    Args:
        queries_there: of each warpgroup.
        keys_there, values_there: of each stage, for both warpgroups.
        keys_free, values_free: of each stage, for the warp that fetches.
        arrived: values of which some are to be cleared first, for the warp that fetches.
    """

    queries_there: Any
    keys_there: Any
    keys_free: Any
    values_there: Any
    values_free: Any
    arrived: Any

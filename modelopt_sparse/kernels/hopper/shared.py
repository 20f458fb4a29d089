"""What a program of the Hopper prefill kernel has in shared memory."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .common import wait_for_all
from .sizes import CHANNELS, KEYS, ROWS


class Buffers(NamedTuple):
    """Tiles in shared memory, in pieces of 64 channels.

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


@gluon.jit
def allocate(dtype: gl.constexpr, C: gl.constexpr):
    """The buffers of a program, and its barriers, ready for use by all of its warps."""
    PIECES: gl.constexpr = C.HEAD_DIM // CHANNELS
    STAGES: gl.constexpr = C.STAGES
    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    buffers = Buffers(
        gl.allocate_shared_memory(dtype, [2 * PIECES, ROWS, CHANNELS], wide),
        gl.allocate_shared_memory(dtype, [STAGES * PIECES, KEYS, CHANNELS], wide),
        gl.allocate_shared_memory(dtype, [STAGES, KEYS, C.HEAD_DIM_V], wide),
    )
    barriers = Barriers(
        _barriers(2, 1), _barriers(STAGES, 1), _barriers(STAGES, 2),
        _barriers(STAGES, 1), _barriers(STAGES, 2), _barriers(1, 1).index(0),
    )  # fmt: skip
    fence_async_shared()
    wait_for_all()
    return buffers, barriers


@gluon.jit
def _barriers(number: gl.constexpr, count: gl.constexpr):
    """Barriers that `count` arrivals complete."""
    found = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(found.index(i), count=count)
    return found

"""Launch tiles, warps and stages: measured tables. Decision tiles are never chosen here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton

# A block's shared memory is at least this on every GPU that Triton supports.
_LEAST_SHARED_MEMORY = 64 * 1024


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Args:
        block_m, block_n: query rows and keys of a launch tile.
        warps, stages: of a program; stages are tiles in flight.
        late_values: values are loaded only when a tile is kept.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    late_values: bool = False


def thriftier(
    launch: Launch, least_m: int = 16, least_n: int = 16, may_be_late: bool = False
) -> Iterator[Launch]:
    """A launch, and then others that need less and less shared memory, down to blocks of this size.

    Args:
        may_be_late: the kernel can load values late.
    """
    while True:
        yield launch
        if launch.stages > 1:
            launch = replace(launch, stages=launch.stages - 1)
        elif may_be_late and not launch.late_values:
            # Then keys and values don't lie there at the same time.
            launch = replace(launch, late_values=True)
        elif launch.block_m > least_m:
            launch = replace(launch, block_m=launch.block_m // 2)
        elif launch.block_n > least_n:
            launch = replace(launch, block_n=launch.block_n // 2)
        else:
            return


def power_of_two(n: int) -> int:
    """The least that is no less than `n`. Triton's own costs the host as much as making a tensor."""
    return 1 << (n - 1).bit_length()


def block_dim(dim: int) -> int:
    """The power of two that holds a head dim, at least 16, the least of a tensor core."""
    return max(16, power_of_two(dim))


def split_dim(dim: int) -> tuple[int, int]:
    """The powers of two that hold the first channels and the rest of them, if that is less than one power."""
    whole = block_dim(dim)
    rest = block_dim(dim - whole // 2)
    return (whole // 2, rest) if whole > 16 and whole // 2 + rest < whole else (whole, 0)


LEAST_LATE = 64
"""Channels of a tile of values, at least, that is loaded late and multiplied by a warpgroup.

In tiles of 32 the ptxas that comes with Triton 3.6 takes a wrong register for the addresses of all but the
first 16 keys.
"""


def may_be_late(dim_v: int) -> bool:
    """Whether values of so many channels may be loaded late."""
    return block_dim(dim_v) >= LEAST_LATE


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use on a device."""
    if device.type != "cuda":
        return _LEAST_SHARED_MEMORY
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])


@lru_cache
def is_hopper(device: torch.device) -> bool:
    """Whether kernels for compute capability 9.0 run on a device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


@lru_cache
def processors(device: torch.device) -> int:
    """How many multiprocessors a device has."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def prefill_launch(
    dims: tuple[int, int],
    itemsize: int,
    has_nm: bool,
    decision: tuple[int, int] | None,
    decides: bool,
    grid_bytes: int,
    capacity: int,
) -> Launch:
    """The launch of the prefill kernel.

    Args:
        dims: head dims of q and v. itemsize: bytes of an element.
        has_nm: whether N:M is in force.
        decision: (rows, keys) of a decision tile, if tiles are skipped or given. decides: the kernel does.
        grid_bytes: bytes that are read for each score, of masks and biases.
        capacity: bytes of shared memory.
    """
    block_d, block_dv = block_dim(dims[0]), block_dim(dims[1])
    widest = max(block_d, block_dv)

    def tile_bytes(block_m: int, block_n: int) -> tuple[int, int, int]:
        """Bytes of the queries, of keys with what is read for their scores, and of values."""
        bytes_k = block_n * (block_d * itemsize + block_m * grid_bytes)
        return block_m * block_d * itemsize, bytes_k, block_n * block_dv * itemsize

    def late(block_m: int, block_n: int, most_stages: int, room: int) -> Launch | None:
        bytes_q, bytes_k, bytes_v = tile_bytes(block_m, block_n)
        stages = min(most_stages, (room - 1024 - bytes_q - bytes_v) // bytes_k)
        warps = 4 if block_m <= 64 else 8
        return Launch(block_m, block_n, warps, stages, late_values=True) if stages > 0 else None

    if decision is not None and itemsize == 2 and not has_nm and may_be_late(dims[1]):
        if decides:
            # A vote waits for all warps of a program. With one row tile each, and two programs that share
            # a multiprocessor, one computes while the other waits: for its vote, or for values it kept.
            sharing = late(max(64, decision[0]), decision[1], 3, capacity // 2)
            if sharing is not None and sharing.stages > 1:
                return sharing
        if widest > 128:
            alone = late(_rows_of_tiles(128, decision[0]), decision[1], 2, capacity)
            if alone is not None:
                return alone

    if itemsize > 2:
        block_m, block_n = 64 if widest <= 128 else 32, 32
    elif (block_dv > 128 and not has_nm) or (widest <= 128 and has_nm):
        block_m, block_n = 64, 64
    else:
        block_m, block_n = 128, 64 if widest > 128 else 128
    if decision is not None:
        block_m, block_n = _rows_of_tiles(block_m, decision[0]), decision[1]
    bytes_q, bytes_k, bytes_v = tile_bytes(block_m, block_n)
    stages = max(1, min(3, (capacity - bytes_q) // (bytes_k + bytes_v)))
    late_values = bytes_q + bytes_k + bytes_v > capacity and (itemsize > 2 or may_be_late(dims[1]))
    warps = 8 if block_m >= 128 and block_m * widest >= 128 * 128 else 4
    if itemsize > 2:
        warps = _exact_warps(block_m, block_n, widest)
    return Launch(block_m, block_n, warps, stages, late_values)


def _rows_of_tiles(rows: int, decision_rows: int) -> int:
    """About so many rows for a program: row tiles decide apart, so it may have several, at most 8."""
    return min(max(rows, decision_rows), 8 * decision_rows)


def _exact_warps(block_m: int, block_n: int, dim: int) -> int:
    """Warps for products in fp32, whose every step is an instruction: enough to keep programs short."""
    steps_of_a_warp = 32 * 2048
    return min(16, max(4, block_m * block_n * dim // steps_of_a_warp))


def decode_launch(
    dims: tuple[int, int],
    itemsize: int,
    rows: int,
    block_keys: int | None,
    capacity: int,
    v_in_k: bool = False,
) -> Launch:
    """The launch of the decode kernel.

    Args:
        dims: head dims of q and v. itemsize: bytes of an element.
        rows: of the heads of a program. block_keys: of a decision tile, if tiles are skipped.
        capacity: bytes of shared memory.
        v_in_k: values are keys, so that one load does.
    """
    block_m = max(16, power_of_two(rows))
    is_deciding = block_keys is not None
    block_n = block_keys or 0
    if not is_deciding:
        block_m = min(block_m, 64)
        block_n = 64 if itemsize == 2 else 32
    bytes_q = block_m * sum(split_dim(dims[0])) * itemsize
    bytes_k = block_n * sum(split_dim(dims[0])) * itemsize
    bytes_v = 0 if v_in_k else block_n * block_dim(dims[1]) * itemsize
    # Values that may be skipped aren't loaded ahead.
    ahead, once = (bytes_k, bytes_v) if is_deciding else (bytes_k + bytes_v, 0)
    # Half the memory, so that two programs share a multiprocessor, if a tile can be loaded ahead.
    once += bytes_q
    room = capacity // 2 if capacity // 2 >= once + 2 * ahead else capacity
    stages = max(1, min(3, (room - once) // ahead))
    warps = 8 if block_m >= 64 else 4
    if itemsize > 2:
        warps = _exact_warps(block_m, block_n, max(map(block_dim, dims)))
    elif is_deciding and block_m == 16 and max(dims) <= 128:
        # Values are waited for: many small programs share a multiprocessor.
        warps, stages = 2, min(stages, 2)
    return Launch(block_m, block_n, warps, stages)


def backward_launch(
    dims: tuple[int, int],
    itemsize: int,
    has_nm: bool,
    decision: tuple[int, int] | None,
    grid_bytes: int,
    capacity: int,
) -> tuple[Launch, Launch]:
    """The launches of the backward kernels of query rows, and of keys and values.

    Args:
        dims, itemsize, grid_bytes, capacity: as for `prefill_launch`.
        decision: (rows, keys) of a decision tile, where lists say which are computed.
    """
    per_row = (block_dim(dims[0]) + block_dim(dims[1])) * itemsize
    widest = max(map(block_dim, dims))
    if itemsize == 2 and widest <= 64:
        queries, keys = (64, 64, 4), (128, 64, 8) if has_nm else (64, 64, 4)
    elif itemsize == 2 and widest <= 128:
        queries, keys = (128, 64, 8), (128, 64, 8) if has_nm else (64, 128, 8)
    elif itemsize == 2 and widest <= 256:
        queries, keys = (64, 32, 4), (64, 32, 8) if has_nm else (32, 64, 8)
    else:
        size = 64 if widest <= 32 else 32
        queries, keys = (size, size, 8), (size, size, 8)

    def launch(block_m: int, block_n: int, warps: int, of_keys: bool) -> Launch:
        if decision is not None:
            # A list names decision tiles: a program's keys are at most one, its rows at most eight.
            block_m, block_n = min(block_m, 8 * decision[0]), min(block_n, decision[1])
        while True:
            resident, moving = (block_n, block_m) if of_keys else (block_m, block_n)
            # Beside the tiles that stay: a tile computed ahead, or weights on their way from rows to columns.
            fixed = resident * per_row + max(moving * per_row // 2, 2 * block_m * block_n) + 4096
            stages = (capacity - fixed) // (moving * per_row + block_m * block_n * grid_bytes)
            if stages > 0 or max(block_m, block_n) == 16:
                return Launch(
                    block_m, block_n, warps, max(1, min(stages, 3 if itemsize == 2 else 1))
                )
            block_m, block_n = max(16, block_m // 2), max(16, block_n // 2)

    of_queries, of_keys = launch(*queries, False), launch(*keys, True)
    if decision is not None and itemsize == 2 and widest <= 128 and not has_nm:
        # Lists are short. With two programs on a multiprocessor, one computes while the other begins or ends.
        block_n = min(64, decision[1])
        tile = block_n * (per_row + 64 * grid_bytes)
        computed_ahead = block_n * block_dim(dims[1]) * itemsize
        if 2 * (64 * per_row + 2 * tile + computed_ahead + 2048) <= capacity + 1024:
            of_queries = Launch(64, block_n, 4, 2)
    return of_queries, of_keys

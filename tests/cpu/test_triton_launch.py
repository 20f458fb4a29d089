"""Launch tables: every entry is one that a GPU can run, and decision tiles stay what the caller says."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import product

import pytest
import torch
from triton.runtime.errors import OutOfResources

from modelopt_sparse.errors import UnsupportedCall
from modelopt_sparse.kernels import Plan, Seqs
from modelopt_sparse.kernels.check import TILE_SIZES, Call
from modelopt_sparse.kernels.launch import (
    Launch,
    backward_launch,
    block_dim,
    may_be_late,
    prefill_launch,
    split_dim,
    thriftier,
)
from modelopt_sparse.kernels.launching import launching

DIMS = (16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
PAIRS = [*((dim, dim) for dim in DIMS), (192, 128), (128, 192), (64, 256), (256, 16), (16, 256)]
DECISIONS = [None, *product(TILE_SIZES, TILE_SIZES)]
# Shared memory of a program: the least, and that of sm_80, sm_86 and sm_90.
CAPACITIES = (64 * 1024, 99 * 1024, 163 * 1024, 227 * 1024)
CALLS = list(product(PAIRS, (2, 4), (False, True), DECISIONS, CAPACITIES))
MOST_GROUPS = 8  # Bits of a list's entry.


def assert_legal(launch: Launch, nm: bool = False) -> None:
    for size in (launch.block_m, launch.block_n):
        assert size >= 16 and size & (size - 1) == 0 and size <= 128
    assert launch.warps in (4, 8, 16) and 1 <= launch.stages <= 3
    assert launch.block_n % 8 == 0 or not nm


def resident(launch: Launch, dims, itemsize, moving: int, kept: int) -> int:
    """Bytes of a kept tile and of those in flight."""
    per_row = (block_dim(dims[0]) + block_dim(dims[1])) * itemsize
    return kept + launch.stages * moving * per_row


def test_narrow_values_are_not_loaded_late():
    for (dims, size, nm, decision, capacity), decides in product(CALLS, (False, True)):
        if decision is not None and dims[1] <= 32 and size == 2:
            best = prefill_launch(dims, size, nm, decision, decides, 0, capacity)
            launches = thriftier(best, *decision, may_be_late=may_be_late(dims[1]))
            assert not any(launch.late_values for launch in launches)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_prefill_launches_are_legal(itemsize):
    for (dims, size, nm, decision, capacity), decides in product(CALLS, (False, True)):
        if size != itemsize or (decides and decision is None):
            continue
        launch = prefill_launch(dims, size, nm, decision, decides, 0, capacity)
        assert_legal(launch, nm)
        if decision is not None:
            rows, keys = decision
            assert launch.block_n == keys
            assert launch.block_m % rows == 0 and launch.block_m // rows <= MOST_GROUPS
        of_queries = launch.block_m * block_dim(dims[0]) * size
        fits = resident(launch, dims, size, launch.block_n, of_queries) <= capacity
        fits = fits or launch.late_values
        assert fits or launch.stages == 1, (dims, size, nm, decision, capacity)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("grid_bytes", [0, 1, 5])
def test_backward_launches_are_legal(grid_bytes, itemsize):
    for dims, size, nm, decision, capacity in CALLS:
        if size != itemsize:
            continue
        case = dims, size, nm, decision, capacity
        per_row = (block_dim(dims[0]) + block_dim(dims[1])) * size
        rows, keys = backward_launch(dims, size, nm, decision, grid_bytes, capacity)
        for launch, moving, kept in (
            (rows, rows.block_n, rows.block_m),
            (keys, keys.block_m, keys.block_n),
        ):
            assert_legal(launch, nm)
            if decision is not None:
                # Of keys a launch tile is a decision tile or a part; of rows, some whole ones or a part.
                assert decision[1] % launch.block_n == 0, case
                groups = launch.block_m / decision[0]
                assert groups <= MOST_GROUPS and (groups < 1 or groups == int(groups)), case
            grids = launch.stages * launch.block_m * launch.block_n * grid_bytes
            fits = resident(launch, dims, size, moving, kept * per_row) + grids <= capacity
            assert fits or max(launch.block_m, launch.block_n) == 16, case


@pytest.mark.skipif(find_spec("triton") is None, reason="the kernels need Triton")
def test_decode_launches_are_legal():
    from modelopt_sparse.kernels.decode import MOST_ROWS
    from modelopt_sparse.kernels.launch import decode_launch

    for dims, size, rows, keys, capacity in product(
        PAIRS, (2, 4), (1, 3, 16, 17, 64, 100, MOST_ROWS), (None, *TILE_SIZES), CAPACITIES
    ):
        launch = decode_launch(dims, size, rows, keys, capacity)
        for block in (launch.block_m, launch.block_n):
            assert block >= 16 and block & (block - 1) == 0
        assert launch.warps in (2, 4, 8, 16) and 1 <= launch.stages <= 3
        if keys is None:
            assert launch.block_m <= 64 and launch.block_n <= 128
        else:
            # All rows that vote together are in one program.
            assert launch.block_n == keys and rows <= launch.block_m <= MOST_ROWS
        of_keys = launch.block_n * sum(split_dim(dims[0])) * size
        of_values = launch.block_n * block_dim(dims[1]) * size
        # Values of tiles that may be skipped are loaded one tile at a time.
        values = of_values if keys is not None else launch.stages * of_values
        assert launch.stages * of_keys + values <= capacity or launch.stages == 1


def test_head_dims_are_padded_to_powers_of_two():
    assert [block_dim(dim) for dim in (1, 16, 17, 24, 64, 65, 256)] == [
        16,
        16,
        32,
        32,
        64,
        128,
        256,
    ]


def test_thriftier_launches_need_less_and_less_down_to_the_decision_tile():
    found = list(thriftier(Launch(128, 64, 8, 3), 32, 64, may_be_late=True))
    assert found[0] == Launch(128, 64, 8, 3) and found[-1].stages == 1
    assert [(x.block_m, x.block_n, x.stages, x.late_values) for x in found] == [
        (128, 64, 3, False),
        (128, 64, 2, False),
        (128, 64, 1, False),
        (128, 64, 1, True),
        (64, 64, 1, True),
        (32, 64, 1, True),
    ]


@pytest.mark.parametrize("error", [OutOfResources(300, 200, "shared memory"), KeyError("other")])
def test_what_a_gpu_is_too_small_for_is_said_and_no_other_error_is_touched(error):
    q = torch.zeros(3, 2, 16)
    call = Call(q, q, q, Seqs.from_lengths([3]), Plan())
    is_too_small = isinstance(error, OutOfResources)
    with pytest.raises(UnsupportedCall if is_too_small else KeyError) as raised, launching(call):
        raise error
    if is_too_small:
        assert "head dims 16 and 16 in torch.float32" in str(raised.value)
        assert "attention_reference" in str(raised.value)
        assert raised.value.__cause__ is error

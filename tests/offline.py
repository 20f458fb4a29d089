"""Compiles the kernels for a GPU that isn't here: Triton's interpreter accepts code that its compiler refuses.

    python -m tests.offline sm_90 dense skip

A line for each kernel that would be launched: its name, warps and bytes of shared memory. Whatever goes wrong
is raised, but that a launch needs more shared memory than the GPU has: so it is told, as on a real one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from modelopt_sparse.kernels import (
    NMSparsity,
    Phase,
    Plan,
    ScoreGrid,
    Seqs,
    SkipSoftmax,
    SkipSoftmaxDecode,
    TileMap,
    backward,
    boxes,
    decode,
    ops,
    prefill,
)
from modelopt_sparse.kernels.check import Call, checked


@dataclass(frozen=True)
class GPU:
    """What the launches ask of a device.

    Args:
        backend, arch, lanes: as Triton names it, and the threads of a warp.
        capacity: bytes of shared memory that a program may use.
        processors: how many run at a time.
        has_copy_engine: whether tensor descriptors are used.
    """

    backend: str
    arch: int | str
    lanes: int
    capacity: int
    processors: int
    has_copy_engine: bool


GPUS = {
    "sm_80": GPU("cuda", 80, 32, 163 * 1024, 108, False),
    "sm_90": GPU("cuda", 90, 32, 227 * 1024, 132, True),
    "sm_100": GPU("cuda", 100, 32, 227 * 1024, 148, True),
    "sm_120": GPU("cuda", 120, 32, 99 * 1024, 170, True),
    "gfx942": GPU("hip", "gfx942", 64, 64 * 1024, 304, False),
}


def attend(plan=None, *, dims=(128, 128), dtype=torch.float16, seqs=((300, 1), (300, 200)), **more):
    """A call of four query heads and two of keys, forward and backward."""
    seqs = Seqs.from_lengths(*map(list, seqs))
    rows, keys = int(seqs.q_len.sum()), int(seqs.k_len.sum())

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    q, k, v = zeros(rows, 4, dims[0]), zeros(keys, 2, dims[0]), zeros(keys, 2, dims[1])
    call = Call(q, k, v, seqs, plan or Plan(), **more)
    ops.run(checked(call)).out.sum().backward()


def grids():
    """A mask that heads share, and a bias of each that wants a gradient."""
    mask = ScoreGrid(torch.ones(2, 1, 300, 300, dtype=torch.bool))
    bias = torch.zeros(2, 4, 300, 300, dtype=torch.float16, requires_grad=True)
    return {"mask": mask, "bias": ScoreGrid(bias)}


def given(rows: int, keys: int) -> Plan:
    """Tiles for the sequences of `attend`."""
    seqs = Seqs.from_lengths([300, 1], [300, 200])
    size = {"rows": 301, "heads": 4}
    return Plan(tiles=TileMap.from_kept([None, None], seqs, True, rows, keys, **size))


SKIP, DECODE = SkipSoftmax(0.1), SkipSoftmaxDecode(0.1)
BOTH = Plan(skip=SKIP, skip_decode=DECODE)
COUNTED = (0.01, 0.1, 0.5)
EXACT = Plan(
    skip=SkipSoftmax(0.1, exact_normalizer=True, count_thresholds=COUNTED),
    skip_decode=SkipSoftmaxDecode(0.1, exact_normalizer=True, count_thresholds=COUNTED),
)
NARROW = Plan(skip=SkipSoftmax(0.1, 16, 16), skip_decode=SkipSoftmaxDecode(0.1, 16, 64))


def bounds() -> torch.Tensor:
    return torch.tensor([[0, 300]] * 301).int()


CASES = {
    "dense": lambda: attend(),
    "skip": lambda: attend(BOTH),
    "2:4": lambda: attend(Plan(NMSparsity(2, 4))),
    "4:8": lambda: attend(Plan(NMSparsity(4, 8))),
    "2:4+skip": lambda: attend(Plan(NMSparsity(2, 4), SKIP, DECODE)),
    "given": lambda: attend(given(64, 128)),
    "given small": lambda: attend(given(16, 16)),
    "small tiles": lambda: attend(NARROW),
    "bounds": lambda: attend(bounds=bounds()),
    "bounds+skip": lambda: attend(BOTH, bounds=bounds()),
    "window": lambda: attend(window=100),
    "full": lambda: attend(causal=False),
    "softcap+sinks": lambda: attend(softcap=30.0, sinks=torch.zeros(4)),
    "grids": lambda: attend(**grids()),
    "grids+skip": lambda: attend(BOTH, **grids()),
    "exact": lambda: attend(EXACT),
    "speculative": lambda: attend(
        Plan(skip_decode=DECODE), seqs=((4, 1), (300, 200)), phase=Phase.DECODE
    ),
    "dim 64": lambda: attend(dims=(64, 64)),
    "dim 64 skip": lambda: attend(BOTH, dims=(64, 64)),
    "dim 80": lambda: attend(dims=(80, 80)),
    "dim 256": lambda: attend(dims=(256, 256)),
    "dim 256 skip": lambda: attend(BOTH, dims=(256, 256)),
    "dims 192 128": lambda: attend(dims=(192, 128)),
    "dims 192 128 skip": lambda: attend(BOTH, dims=(192, 128)),
    "fp32": lambda: attend(dtype=torch.float32),
    "fp32 skip": lambda: attend(BOTH, dtype=torch.float32),
    "fp32 2:4": lambda: attend(Plan(NMSparsity(2, 4)), dtype=torch.float32, dims=(64, 64)),
}


class Driver:
    """Stands for the driver of a GPU."""

    def __init__(self, gpu: GPU) -> None:
        self._target = GPUTarget(gpu.backend, gpu.arch, gpu.lanes)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_only(gpu: GPU) -> None:
    """From now on launches compile for that GPU, and print what they would launch."""
    driver.set_active(Driver(gpu))
    run = JITFunction.run

    def compiled(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found = kernel.metadata
        if found.shared > gpu.capacity:
            print(f"  {self.__name__}: {found.shared} bytes are too many", flush=True)
            raise OutOfResources(found.shared, gpu.capacity, "shared memory")
        print(f"  {self.__name__}: {found.num_warps} warps, {found.shared} bytes", flush=True)
        return kernel

    JITFunction.run = compiled
    for module in (prefill, decode, backward):
        module.shared_memory = lambda device: gpu.capacity
    backward.processors = lambda device: gpu.processors
    boxes._has_copy_engine = lambda device: gpu.has_copy_engine


def chain(error: BaseException | None) -> Iterator[str]:
    """An exception and what it came from."""
    while error is not None:
        yield f"{type(error).__name__}: {error}"
        error = error.__cause__


def main(target: str, *names: str) -> int:
    compile_only(GPUS[target])
    failed = 0
    for name in names or CASES:
        print(f"{target} {name}", flush=True)
        try:
            CASES[name]()
        except Exception as error:
            failed += 1
            print("  FAILED", *chain(error), sep="\n  > ", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Compiles the kernels for a GPU that isn't here: Triton's interpreter takes code that its compiler refuses.

    python -m tests.offline sm_90 dense skip

A line for each kernel that would be launched: its name, warps and bytes of shared memory. Whatever goes wrong
is told in full. As on a real GPU, a launch that needs more of something than there is gets `OutOfResources`.
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
    PagedKV,
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
    hopper_prefill,
    ops,
    prefill,
)
from modelopt_sparse.kernels import (
    latent as latents,
)
from modelopt_sparse.kernels.check import FP8, Call, checked


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


def attend(
    plan=None, *, dims=(128, 128), heads=(4, 2), dtype=torch.float16, seqs=((300, 1), (300, 200)),
    trains=True, **more,
):  # fmt: skip
    """A call, forward and backward."""
    seqs = Seqs.from_lengths(*map(list, seqs))
    rows, keys = int(seqs.q_len.sum()), int(seqs.k_len.sum())

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=trains)

    q = zeros(rows, heads[0], dims[0])
    k, v = (zeros(keys, heads[1], dim) for dim in dims)
    found = ops.run(checked(Call(q, k, v, seqs, plan or Plan(), **more)))
    if trains:
        (found.out.sum() + found.lse.sum()).backward()


def paged(
    page_size, plan=None, *, seqs=((300, 1), (300, 9000)), dims=(128, 128), dtype=torch.float16, **more
):  # fmt: skip
    """A call with keys in pages."""
    seqs = Seqs.from_lengths(*map(list, seqs))
    q = torch.zeros(int(seqs.q_len.sum()), 4, dims[0], dtype=torch.float16)
    k, v = (torch.zeros(1, page_size, 2, dim).to(dtype) for dim in dims)
    table = torch.zeros(2, -(-seqs.max_k // page_size), dtype=torch.int32)
    ops.run(checked(Call(q, k, v, seqs, plan or Plan(), block_tables=(table, table), **more)))


def latent(heads=16, plan=None, dtype=torch.float16, page_size=64):
    """Multi-head latent attention of two sequences that decode."""
    seqs = Seqs.from_lengths([1, 2], [300, 9000])
    pages = PagedKV.from_latent(
        torch.zeros(1, page_size, 576).to(dtype), 512, torch.zeros(2, 300, dtype=torch.int32)
    )
    q = torch.zeros(3, heads, 576, dtype=torch.bfloat16 if dtype == FP8 else dtype)
    more = {"block_tables": pages.block_tables, "phase": Phase.DECODE}
    ops.run(checked(Call(q, pages.k, pages.v, seqs, plan or Plan(), scale=0.1, **more)))


def attend_in_tf32():
    torch.set_float32_matmul_precision("high")
    try:
        attend(dtype=torch.float32)
    finally:
        torch.set_float32_matmul_precision("highest")


def grids():
    """A mask that heads share, and a bias of each that wants a gradient."""
    mask = ScoreGrid(torch.ones(2, 1, 300, 300, dtype=torch.bool))
    bias = torch.zeros(2, 4, 300, 300, dtype=torch.float16, requires_grad=True)
    return {"mask": mask, "bias": ScoreGrid(bias)}


def given(rows: int, keys: int, nm: NMSparsity | None = None, phase: Phase | None = None) -> Plan:
    """Tiles for the sequences of `attend`."""
    seqs = Seqs.from_lengths([300, 1], [300, 200])
    size = {"rows": 301, "heads": 4, "phase": phase}
    return Plan(nm, tiles=TileMap.from_kept([None, None], seqs, True, rows, keys, **size))


def skip(
    rows=64, keys=128, decode_keys=64, threshold=0.1, nm=None, vote_heads=None, **more
) -> Plan:
    """Tiles are skipped, in both phases."""
    decode = SkipSoftmaxDecode(threshold, decode_keys, vote_heads=vote_heads, **more)
    return Plan(nm, SkipSoftmax(threshold, rows, keys, **more), decode)


BOUNDS = torch.tensor([[0, 300]] * 301).int()
SINKS = torch.zeros(4)
LAMBDAS = torch.full((2, 4), 0.1)
COUNTED = (0.01, 0.1, 0.5)
TWO, FOUR = NMSparsity(2, 4), NMSparsity(4, 8)
FP32 = torch.float32
DRAFT = {"seqs": ((4, 1), (300, 200)), "phase": Phase.DECODE}
LONG = {"seqs": ((1, 1), (9000, 200)), "trains": False}

CASES = {
    "dense": lambda: attend(),
    "skip": lambda: attend(skip()),
    "2:4": lambda: attend(Plan(TWO)),
    "4:8": lambda: attend(Plan(FOUR), phase=Phase.PREFILL),
    "2:4+skip": lambda: attend(skip(nm=TWO)),
    "given": lambda: attend(given(64, 128)),
    "given 16x16": lambda: attend(given(16, 16)),
    "4:8+given": lambda: attend(given(64, 128, FOUR, Phase.PREFILL), phase=Phase.PREFILL),
    "skip 16x16": lambda: attend(skip(16, 16, 16)),
    "skip 16x128": lambda: attend(skip(16, 128, 128)),
    "skip 32x64": lambda: attend(skip(32, 64, 32)),
    "skip 128x16": lambda: attend(skip(128, 16)),
    "skip per head": lambda: attend(skip(threshold=LAMBDAS, vote_heads=1)),
    "skip of 3 heads": lambda: attend(skip(), heads=(3, 1)),
    "skip untrained": lambda: attend(skip(), trains=False),
    "skip details": lambda: attend(skip(), details=True),
    "counted": lambda: attend(skip(threshold=None, count_thresholds=COUNTED)),
    "histogram": lambda: attend(skip(threshold=None, histogram=True)),
    "histogram 16x16": lambda: attend(skip(16, 16, 16, histogram=True, count_thresholds=COUNTED)),
    "splits histogram per head": lambda: attend(skip(vote_heads=1, histogram=True), **LONG),
    "exact": lambda: attend(skip(exact_normalizer=True, count_thresholds=COUNTED)),
    "bounds": lambda: attend(bounds=BOUNDS),
    "bounds+skip": lambda: attend(skip(), bounds=BOUNDS),
    "window": lambda: attend(window=100),
    "window+skip": lambda: attend(skip(), window=100),
    "full": lambda: attend(causal=False),
    "softcap+sinks": lambda: attend(softcap=30.0, sinks=SINKS),
    "grids": lambda: attend(**grids()),
    "grids+skip": lambda: attend(skip(), **grids()),
    "grids+exact": lambda: attend(skip(exact_normalizer=True), phase=Phase.PREFILL, **grids()),
    "speculative": lambda: attend(**DRAFT),
    "speculative skip": lambda: attend(Plan(skip_decode=SkipSoftmaxDecode(0.1)), **DRAFT),
    "splits": lambda: attend(**LONG),
    "splits skip": lambda: attend(skip(), heads=(8, 2), **LONG),
    "splits skip per head": lambda: attend(skip(vote_heads=1), details=True, **LONG),
    "pages of 64": lambda: paged(64),
    "pages of 128 skip": lambda: paged(128, skip()),
    "pages of 16 2:4+skip": lambda: paged(16, skip(nm=TWO), window=100),
    "pages of 5": lambda: paged(5, skip(), bounds=BOUNDS),
    "pages of 8 bits": lambda: paged(64, dtype=FP8),
    "pages of 8 bits skip": lambda: paged(16, skip(), dtype=FP8),
    "latent of 8 bits": lambda: latent(128, dtype=FP8),
    "latent of 128 heads": lambda: latent(128),
    "latent skip": lambda: latent(128, Plan(skip_decode=SkipSoftmaxDecode(0.1, vote_heads=16))),
    "dim 64": lambda: attend(dims=(64, 64)),
    "dim 64 skip": lambda: attend(skip(), dims=(64, 64)),
    "dim 80": lambda: attend(dims=(80, 80)),
    "dim 256": lambda: attend(dims=(256, 256)),
    "dim 256 skip": lambda: attend(skip(), dims=(256, 256)),
    "dims 192, 128": lambda: attend(dims=(192, 128)),
    "dims 192, 128 skip": lambda: attend(skip(), dims=(192, 128)),
    "fp32": lambda: attend(dtype=FP32),
    "fp32 skip": lambda: attend(skip(), dtype=FP32),
    "fp32 2:4": lambda: attend(Plan(TWO), dtype=FP32, dims=(64, 64)),
    "tf32": attend_in_tf32,
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
        for kind, needed, most in (
            ("shared memory", found.shared, gpu.capacity),
            ("tensor memory", getattr(found, "tmem_size", None) or 0, 512),
            ("threads", found.num_warps * gpu.lanes, 1024),
        ):
            if needed > most:
                print(f"  {self.__name__} is refused: {needed} of {kind}", flush=True)
                raise OutOfResources(needed, most, kind)
        print(f"  {self.__name__}: {found.num_warps} warps, {found.shared} bytes", flush=True)
        return kernel

    JITFunction.run = compiled
    for module in (prefill, decode, backward):
        module.shared_memory = lambda device: gpu.capacity
    backward.processors = lambda device: gpu.processors
    boxes._has_copy_engine = lambda device: gpu.has_copy_engine
    for module in (latents, hopper_prefill):
        module.is_hopper = lambda device: gpu.arch == 90


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

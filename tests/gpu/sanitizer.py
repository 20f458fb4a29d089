"""Small calls of every kernel with checked results, to run under NVIDIA's compute-sanitizer.

    compute-sanitizer --tool memcheck python -m tests.gpu.sanitizer    (racecheck, initcheck, synccheck)

Results are compared on the CPU. Tensors are written there too, and copied: what a tool reports is the
kernels' own. `--only TEXT` runs the calls whose name holds it, `--list` prints the names.
"""

from __future__ import annotations

import os

# A block from torch's cache was written before, so nothing could be seen to be missing in it.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import argparse
import sys
from dataclasses import fields, replace
from functools import partial

import torch

from modelopt_sparse.kernels import (
    PagedKV,
    Phase,
    attention_paged,
    attention_reference,
    attention_varlen,
)
from modelopt_sparse.kernels.types import AttentionOutput, ScoreGrid, Seqs, TileCounts, TileMap
from tests.gpu.build import Setup, build
from tests.gpu.cases import SHAPES, Case
from tests.gpu.checks import check_decisions, check_values
from tests.gpu.gradients import compare_gradients, output_gradient, with_leaves
from tests.gpu.judge import sheets_of
from tests.paged import in_pages

DEVICE = "cuda"
SHAPES["tiny"] = ([0, 40, 1, 150], [0, 40, 33, 150])
SHAPES["tiny_chunk"] = ([20, 70], [170, 130])
SHAPES["tiny_rows"] = ([90, 3], [50, 0])
SHAPES["tiny_decode"] = ([1, 1, 1], [1, 200, 0])
SHAPES["tiny_draft"] = ([3, 5], [77, 5])
SHAPES["tiny_splits"] = ([1, 1], [1100, 520])

PREFILL = (
    ("tiny", "bf16", (64, 64), (4, 2), {}),
    ("tiny", "fp16", (72, 72), (4, 4), {"sight": "full", "sinks": True, "strides": "odd"}),
    ("tiny_rows", "fp32", (16, 16), (4, 2), {"sight": "window"}),
    ("tiny_chunk", "bf16", (128, 128), (8, 1), {"sight": "bounds", "gaps": True}),
    ("tiny", "fp16", (64, 32), (4, 2), {"mask": True, "gaps": True}),
    ("tiny", "bf16", (32, 32), (6, 2), {"bias": True, "softcap": 20.0, "gaps": True}),
    ("tiny", "fp16", (64, 64), (4, 2), {"nm": (2, 4), "gaps": True}),
    ("tiny_chunk", "bf16", (80, 80), (4, 2), {"nm": (4, 8), "shield": (4, 17)}),
    ("tiny_rows", "fp16", (64, 64), (4, 4), {"nm": (1, 4), "sight": "full", "shield": (0, 0)}),
    ("tiny", "bf16", (64, 64), (4, 2), {"skip": "on", "blocks": (16, 16), "gaps": True}),
    ("tiny_chunk", "bf16", (128, 128), (4, 2), {"skip": "on"}),
    ("tiny", "fp16", (96, 96), (4, 2), {"skip": "exact", "blocks": (32, 128), "sinks": True}),
    ("tiny", "fp32", (64, 64), (4, 4), {"skip": "counts", "blocks": (64, 32), "mask": True}),
    ("tiny_chunk", "fp16", (64, 64), (8, 1), {"skip": "given", "blocks": (16, 16)}),
    ("tiny", "bf16", (64, 64), (4, 2), {"skip": "on", "nm": (2, 4), "blocks": (128, 64)}),
    ("tiny_chunk", "fp16", (192, 128), (4, 2), {"skip": "given", "nm": (2, 8), "gaps": True}),
    ("tiny_rows", "bf16", (256, 256), (4, 2), {"skip": "on", "blocks": (16, 16)}),
    ("tiny_chunk", "fp16", (128, 128), (4, 2), {"skip": "given"}),
    ("tiny_rows", "bf16", (64, 64), (4, 2), {"skip": "exact", "sight": "window", "sinks": True}),
    ("tiny", "fp16", (192, 128), (4, 2), {"skip": "on", "gaps": True}),
    ("tiny_chunk", "bf16", (256, 256), (4, 2), {"skip": "on", "gaps": True}),
)
DECODE = (
    ("tiny_decode", "bf16", (64, 64), (8, 1), {}),
    ("tiny_decode", "fp16", (128, 128), (4, 2), {"skip_decode": "on", "segments": (16, 64)}),
    ("tiny_draft", "bf16", (72, 72), (4, 2), {"skip_decode": "on", "segments": (32, 128)}),
    ("tiny_decode", "fp32", (64, 32), (4, 4), {"skip_decode": "per_head", "segments": (16, 64)}),
    ("tiny_decode", "bf16", (192, 128), (4, 2), {"skip_decode": "exact", "mask": True}),
    ("tiny", "fp16", (64, 64), (6, 2), {"skip_decode": "counts", "bias": True, "sinks": True}),
    ("tiny_splits", "bf16", (64, 64), (4, 2), {}),
    ("tiny_splits", "fp16", (64, 64), (4, 2), {"skip_decode": "on", "segments": (16, 64)}),
)


PAGED = (
    ("tiny", "bf16", (64, 64), (4, 2), {"page": 16}),
    ("tiny_chunk", "fp16", (128, 128), (4, 2), {"skip": "on", "page": 64, "layout": "together"}),
    ("tiny", "fp16", (64, 64), (4, 2), {"nm": (2, 4), "page": 7, "layout": "two_tables"}),
    ("tiny_decode", "bf16", (64, 64), (8, 1), {"page": 128, "layout": "hnd"}),
    ("tiny_splits", "fp16", (128, 128), (4, 2),
     {"skip_decode": "on", "segments": (16, 64), "page": 32}),
    ("tiny_splits", "bf16", (80, 80), (4, 2),
     {"skip_decode": "exact", "segments": (16, 64), "page": 1}),
)  # fmt: skip


def cases() -> list[Case]:
    found = []
    for i, (shape, dtype, dims, heads, more) in enumerate(PREFILL + DECODE + PAGED):
        trains = i < len(PREFILL)
        found.append(Case(i, 0, shape, dtype, dims, heads, gradients=trains, **more))
    return found


def moved(value, device: str):
    """Everything in dataclasses and dictionaries that is a tensor, on a device, with the same strides."""
    if isinstance(value, torch.Tensor):
        return _moved_tensor(value, device)
    if isinstance(value, dict):
        return {name: moved(part, device) for name, part in value.items()}
    if isinstance(value, (Setup, Seqs, PagedKV, ScoreGrid, TileMap, TileCounts, AttentionOutput)):
        parts = {field.name: moved(getattr(value, field.name), device) for field in fields(value)}
        return replace(value, **parts)
    plan_parts = ("skip", "skip_decode", "tiles", "threshold")
    for name in plan_parts:
        part = getattr(value, name, None)
        if part is not None:
            value = replace(value, **{name: moved(part, device)})
    return value


def _moved_tensor(x: torch.Tensor, device: str) -> torch.Tensor:
    x = x.detach()
    if x.device == torch.device(device) or x.numel() == 0:
        return x.to(device)
    if device == "cpu":
        return x.cpu()
    # What lies between the elements is copied too, so that no kernel of torch's touches the memory.
    size = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    whole = x.as_strided((size,), (1,), x.storage_offset())
    before = x.as_strided((x.storage_offset(),), (1,), 0)
    there = torch.cat([before, whole]).to(device)
    return there.as_strided(x.shape, x.stride(), x.storage_offset())


def run_case(case: Case) -> str:
    """Runs a case on the device and checks it on the CPU; returns what was skipped."""
    here = build(case, "cpu")
    there = moved(here, DEVICE)
    call = partial(attention_varlen, *there.qkv)
    if case.page:
        cache = moved(in_pages(*here.qkv[1:], case.page, case.layout), DEVICE)
        call = partial(attention_paged, there.q, cache, there.seqs)
    with torch.no_grad():
        output = call(**there.options, plan=there.plan, details=True)
        plain = call(**there.options, plan=there.plan)
    output, plain = moved(output, "cpu"), moved(plain, "cpu")
    sheets = sheets_of(here, output.kept)
    seen, reference = check_decisions(here, output)
    check_values(here, output, sheets, reference)
    check_values(here, plain, sheets)
    if case.gradients:
        d_out = output_gradient(here, sheets, 0)
        trained, leaves = with_leaves(there)
        output = attention_varlen(*trained.qkv, **trained.options, plan=trained.plan)
        on_device = moved(d_out, DEVICE)
        gradients = torch.autograd.grad(output.out, list(leaves.values()), on_device)
        found = {name: grad.cpu() for name, grad in zip(leaves, gradients, strict=True)}
        compare_gradients(here, sheets, d_out, found)
    return f"{seen.skipped} of {seen.visible} tiles skipped"


def run_latents() -> str:
    """The kernel for latents, over a page with unused slots."""
    generator = torch.Generator().manual_seed(0)
    lengths, heads = [150, 0, 64], 64
    seqs = Seqs.from_lengths([2, 1, 1], lengths)
    q = torch.randn(4, heads, 576, generator=generator).bfloat16()
    k = torch.randn(sum(lengths), 1, 576, generator=generator).bfloat16()
    pages = in_pages(k, k, seqs, 64)
    cache = PagedKV.from_latent(pages.k.squeeze(2), 512, pages.block_table)
    options = {"phase": Phase.DECODE, "scale": 576**-0.5}
    with torch.no_grad():
        found = attention_paged(q.to(DEVICE), moved(cache, DEVICE), moved(seqs, DEVICE), **options)
        wanted = attention_reference(q.double(), k.double(), k[..., :512].double(), seqs, **options)
    error = float((found.out.cpu().double() - wanted.out).norm() / wanted.out.norm())
    assert error < 5e-3, error
    return f"error {error:.1e}"


def main() -> int:
    """Runs all cases; the exit status is the number that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the calls whose name holds this")
    parser.add_argument("--list", action="store_true", help="print the names of the calls")
    chosen = parser.parse_args()
    failed = 0
    runs = [(case.name, partial(run_case, case)) for case in cases()]
    for name, run in [*runs, ("latents", run_latents)]:
        if chosen.only not in name:
            continue
        if chosen.list:
            print(name)
            continue
        try:
            print(name, run(), flush=True)
        except AssertionError as error:
            failed += 1
            print(name, "FAILED:", error, flush=True)
    print(f"{failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(main())

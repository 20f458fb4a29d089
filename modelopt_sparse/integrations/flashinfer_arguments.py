"""FlashInfer's arguments as the kernels take them, and what comes back as FlashInfer returns it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modelopt_sparse.errors import ArgumentError, describe
from modelopt_sparse.kernels.pages import PagedKV
from modelopt_sparse.kernels.types import AttentionOutput, Seqs

Cache = Tensor | tuple[Tensor, Tensor]
Result = Tensor | tuple[Tensor, Tensor]


def skipping_of(
    factor: float | None, threshold: float | Tensor | None, seq_lens: Tensor
) -> dict[str, Any] | None:
    """Threshold and scale factor as `SkipSoftmax` takes them; None is dense."""
    names = "skip_softmax_threshold_scale_factor", "skip_softmax_threshold"
    if factor is not None and threshold is not None:
        raise ArgumentError(describe(names[0], f"{names[1]} as well", "one of the two"))
    if isinstance(threshold, Tensor):
        batch = tuple(seq_lens.shape)
        if threshold.shape != batch or threshold.dtype != torch.float32:
            got = f"{threshold.dtype} {tuple(threshold.shape)}"
            raise ArgumentError(describe(names[1], got, f"torch.float32 {batch}"))
        return {"threshold": threshold[:, None]}
    if threshold:
        return {"threshold": threshold}
    if not factor:
        return None
    if isinstance(factor, bool) or not math.isfinite(factor) or factor < 0:
        raise ArgumentError(describe(names[0], factor, "a finite number from 0 on, or None"))
    return {"threshold": None, "scale_factor": factor}


def refuse(**given: object) -> None:
    """Raises for the first argument that isn't None."""
    for name, value in given.items():
        if value is not None:
            got = f"a {type(value).__name__}" if isinstance(value, Tensor) else value
            raise ArgumentError(
                describe(name, got, "its default; quantised data and tree masks are not offered")
            )


def refuse_beside_skipping(skipping: dict[str, Any] | None, **given: object) -> None:
    """Another way to leave keys out is refused, and by both names where tiles are skipped as well."""
    for name, value in given.items():
        if value is not None:
            beside = "" if skipping is None else " beside a skip-softmax threshold"
            raise ArgumentError(
                describe(name, f"{value}{beside}", "its default: that is not offered")
            )


def check_batch(batch_size: int, seq_lens: Tensor) -> None:
    """`seq_lens` is of that many sequences."""
    if seq_lens.shape != (batch_size,):
        raise ArgumentError(
            describe("seq_lens", f"shape {tuple(seq_lens.shape)}", f"[{batch_size}]")
        )


def paged(kv_cache: Cache, block_tables: Tensor, kv_layout: str, is_shared: bool) -> PagedKV:
    """A cache in one of FlashInfer's layouts."""
    if kv_layout not in ("HND", "NHD"):
        raise ArgumentError(describe("kv_layout", repr(kv_layout), "'HND' or 'NHD'"))
    if isinstance(kv_cache, Tensor):
        if kv_cache.ndim != 5 or kv_cache.shape[1] not in (1, 2):
            takes = "[pages, 1 or 2, ...] of five dims, or a tuple (K, V)"
            raise ArgumentError(describe("kv_cache", f"shape {tuple(kv_cache.shape)}", takes))
        k, v = kv_cache[:, 0], kv_cache[:, -1]
    else:
        k, v = kv_cache
    if block_tables.ndim != (2 if is_shared else 3) or (
        not is_shared and block_tables.shape[1] != 2
    ):
        takes = "[B, pages], or [B, 2, pages] with uses_shared_paged_kv_idx=False"
        raise ArgumentError(describe("block_tables", f"shape {tuple(block_tables.shape)}", takes))
    tables = (block_tables,) if is_shared else (block_tables[:, 0], block_tables[:, 1])
    return PagedKV.from_hnd(k, v, *tables) if kv_layout == "HND" else PagedKV(k, v, *tables)


def row_starts(
    total: int, seq_lens: Tensor, q_len: int | None, cum_seq_lens_q: Tensor | None, max_q_len: int | None
) -> tuple[Tensor, int]:  # fmt: skip
    """Where the rows of each sequence begin and end, and how many there are at most."""
    if cum_seq_lens_q is not None:
        if max_q_len is None:
            raise ArgumentError(describe("max_q_len", None, "an int beside cum_seq_lens_q"))
        return cum_seq_lens_q, max_q_len
    batch = seq_lens.shape[0]
    if q_len is None or total != batch * q_len:
        takes = f"{batch} sequences of q_len_per_req rows, or cum_seq_lens_q"
        raise ArgumentError(describe("query", f"{total} rows, q_len_per_req {q_len}", takes))
    starts = torch.arange(batch + 1, dtype=torch.int32, device=seq_lens.device) * q_len
    return starts, q_len


def seqs_of(
    cum_seq_lens_q: Tensor, seq_lens: Tensor, max_q: int, max_k: int, cache: PagedKV
) -> Seqs:
    """The sequences of a paged call."""
    # Lengths can exceed neither, so a generous bound is no error.
    holds = cache.block_table.shape[-1] * cache.k.shape[1]
    q_start = cum_seq_lens_q[:-1]
    return Seqs(q_start, cum_seq_lens_q[1:] - q_start, q_start, seq_lens, max_q, min(max_k, holds))


def scale_of(bmm1_scale: float) -> float:
    """The softmax scale."""
    if isinstance(bmm1_scale, Tensor):
        remedy = "Multiply the query by it."
        raise ArgumentError(describe("bmm1_scale", "a Tensor", "a number", remedy))
    return bmm1_scale


def window_of(window_left: int) -> int | None:
    """How many keys a row sees, itself among them."""
    return None if window_left < 0 else window_left + 1


def sinks_of(sinks: Tensor | Sequence[Tensor] | None) -> Tensor | None:
    """One tensor of sink logits."""
    if sinks is None or isinstance(sinks, Tensor):
        return sinks
    if len(sinks) != 1:
        raise ArgumentError(describe("sinks", f"{len(sinks)} tensors", "one tensor [Hq]"))
    return sinks[0]


def result_of(
    found: AttentionOutput,
    rows: torch.Size,
    bmm2_scale: float | Tensor,
    out: Tensor | None,
    out_dtype: torch.dtype | None,
    lse: Tensor | None,
    return_lse: bool,
) -> Result:
    """What was found, in the caller's shapes and tensors."""
    if out_dtype is not None and not (
        isinstance(out_dtype, torch.dtype) and out_dtype.is_floating_point
    ):
        raise ArgumentError(describe("out_dtype", out_dtype, "a floating torch.dtype"))
    values = found.out
    if isinstance(bmm2_scale, Tensor) or bmm2_scale != 1:
        values = values * bmm2_scale
    dtype = out_dtype or (found.out.dtype if out is None else out.dtype)
    values = values.to(dtype).view(*rows, *values.shape[1:])
    for name, given, of in (("out", out, values), ("lse", lse, found.lse)):
        if given is not None and (given.shape != of.shape or given.dtype != of.dtype):
            got, takes = f"{given.dtype} {tuple(given.shape)}", f"{of.dtype} {tuple(of.shape)}"
            raise ArgumentError(describe(name, got, takes))
    values = values if out is None else out.copy_(values)
    of_rows = found.lse if lse is None else lse.copy_(found.lse)
    return (values, of_rows) if return_lse else values

"""A call's tensors and numbers as kernels take them."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .check import Call
from .launch import block_dim, power_of_two
from .thresholds import log2_threshold
from .types import NMSparsity, ScoreGrid, Seqs, SkipSoftmax, SkipSoftmaxDecode

_ELEMENT = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}

# Lengths, windows and counts are below this, so that their sums are int32.
FAR = 2**30


def features(call: Call) -> dict[str, Any]:
    """The constants of a `Variant` that follow from the call alone."""
    dims = call.q.shape[-1], call.v.shape[-1]
    is_fp32 = call.q.dtype == torch.float32
    is_upcast = call.q.dtype == torch.bfloat16 and call.q.device.type == "cpu"
    as_q = None if call.k.dtype == call.q.dtype else _ELEMENT[call.q.dtype]
    is_exact = is_fp32 and torch.get_float32_matmul_precision() == "highest"
    return {
        "HEAD_DIM": dims[0],
        "HEAD_DIM_V": dims[1],
        "BLOCK_D": block_dim(dims[0]),
        "BLOCK_DV": block_dim(dims[1]),
        "PAGE": 0 if call.block_tables is None else call.k.shape[1],
        "CAUSAL": call.causal,
        "HAS_BOUNDS": call.bounds is not None,
        # Exact products are long, and a second loop takes as long to compile as the first.
        "ONLY_EDGES": is_exact or call.mask is not None or call.bias is not None,
        "HAS_MASK": call.mask is not None,
        "HAS_BIAS": call.bias is not None,
        "HAS_SOFTCAP": call.softcap is not None,
        "HAS_SINKS": call.sinks is not None,
        "PRECISION": "tf32" if is_fp32 and not is_exact else "ieee",
        "UPCAST": is_upcast,
        "KV_AS": tl.float32 if is_upcast else as_q,
    }


def strides(x: Tensor) -> tuple[int, int]:
    """Elements from token to token and from head to head; of pages too."""
    return x.stride(-3), x.stride(-2)


def pages(call: Call) -> tuple[Tensor | None, Tensor | None, int, int, int, int]:
    """The block tables of k and v, and elements from row to row of these and from page to page."""
    if call.block_tables is None:
        return None, None, 0, 0, 0, 0
    k_table, v_table = call.block_tables
    return (
        k_table, v_table, k_table.stride(0), v_table.stride(0), call.k.stride(0), call.v.stride(0)
    )  # fmt: skip


def in_one_page(call: Call, block_keys: int) -> bool:
    """Whether no page ends within a tile of keys."""
    return call.block_tables is None or call.k.shape[1] % block_keys == 0


def sequences(seqs: Seqs) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Where the sequences lie, and how many there are."""
    return seqs.q_start, seqs.q_len, seqs.k_start, seqs.k_len, seqs.q_len.shape[0]


def grid(scores: ScoreGrid | None, seqs: Seqs) -> tuple[Any, ...]:
    """A grid's values, starts and strides; the stride of heads is 0 where they share.

    Kernels want the keys of a row side by side, so values that lie otherwise are copied.
    """
    if scores is None:
        return None, None, None, 0, 0, 0, 0
    values = scores.values.view(torch.uint8) if scores.values.dtype == torch.bool else scores.values
    values = values if values.stride(-1) == 1 else values.contiguous()
    by_item, by_head, by_row, by_key = values.stride()
    if values.shape[1] == 1:
        by_head = 0
    zeros = torch.zeros_like(seqs.q_len)
    row_start = zeros if scores.row_start is None else scores.row_start
    key_start = zeros if scores.key_start is None else scores.key_start
    return values, row_start, key_start, by_item, by_head, by_row, by_key


def grid_bytes(call: Call) -> int:
    """Bytes that are read for each score, of the mask and the bias."""
    return sum(grid.values.element_size() for grid in (call.mask, call.bias) if grid is not None)


def window(keys: int | None) -> int:
    """How many keys a causal row sees at most."""
    return min(keys or FAR, FAR)


def shields(nm: NMSparsity | None) -> tuple[int, int]:
    """Sink tokens and the dense window of N:M."""
    return (min(nm.num_sink_tokens, FAR), min(nm.dense_window_size, FAR)) if nm else (0, 0)


def threshold(
    skip: SkipSoftmax | SkipSoftmaxDecode | None, batch: int, heads: int, device: torch.device
) -> tuple[float, Tensor | None, tuple[int, int] | None]:
    """log2(lambda) as a number, or as a tensor [B, Hq] and its strides."""
    value = None if skip is None else skip.threshold
    if isinstance(value, Tensor):
        log2 = log2_threshold(value, batch, heads, device)
        return 0.0, log2, (log2.stride(0), log2.stride(1))
    return (math.log2(value) if value else -math.inf), None, None


def padded(n_thresholds: int) -> int:
    """The power of two that holds so many thresholds; 0 for none."""
    return power_of_two(n_thresholds) if n_thresholds else 0


def first_bin(skip: SkipSoftmax | SkipSoftmaxDecode) -> int:
    """The row of a call's counts at which the histogram begins."""
    return 2 + padded(len(skip.count_thresholds))


def counted_thresholds(skip: SkipSoftmax | SkipSoftmaxDecode | None) -> tuple[float, ...] | None:
    """log2 of further thresholds, padded with what skips nothing.

    Numbers, not a tensor: to fill one waits for the device, and to keep one outlives CUDA graphs.
    """
    if skip is None or not skip.count_thresholds:
        return None
    log2 = [math.log2(value) if value else -math.inf for value in skip.count_thresholds]
    return (*log2, *[-math.inf] * (padded(len(log2)) - len(log2)))

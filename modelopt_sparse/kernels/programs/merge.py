"""The merge kernel: adds up the splits of rows that decode. Source: Flash-Decoding."""

from __future__ import annotations

import triton
import triton.language as tl

from modelopt_sparse.kernels.device.run_time import RUN_TIME
from modelopt_sparse.kernels.device.softmax import LOG2_E, finish, rescale

# Splits that a program adds up together.
_SPLITS = tl.constexpr(32)


@triton.jit(do_not_specialize=RUN_TIME)
def merge_kernel(
    split_sums, split_out, out, lse, out_strides, q_start, q_len, k_len,
    n_entries, n_heads, max_q, short_keys, long_keys, long, sinks, v_scale, dropped_bound, dropped,
    C: tl.constexpr,
):  # fmt: skip
    """One program: C.CHANNELS channels of one row of one head.

    A split's place is fixed, so its sum is too, whatever the batch.

    Args:
        split_sums: fp32 [splits, n_entries, 4], of each row in each split: running max (log2), and the sums
            of exponentials kept, a bound on those skipped, and those skipped; the last two for C.SKIP.
        split_out: fp32 [splits, n_entries, Dv], weighted sums of values.
        n_entries: sequences x max_q x heads.
        short_keys, long_keys: keys of a split, the second for sequences of `long` keys or more.
    """
    chunk = tl.program_id(1)
    entry = tl.program_id(0)
    head = entry % n_heads
    index = entry // n_heads % max_q
    sequence = entry // n_heads // max_q
    n_q = tl.load(q_len + sequence)
    if C.ALL_DECODE:
        if index >= n_q:
            return
    elif n_q != 1:
        return
    n_k = tl.load(k_len + sequence)
    split_keys = tl.where(n_k < long, short_keys, long_keys)
    n_splits = (n_k + split_keys - 1) // split_keys

    running = tl.full([1], float("-inf"), tl.float32)
    total = tl.full([1], 0.0, tl.float32)
    bound = total
    lost = total
    channel = chunk * C.CHANNELS + tl.arange(0, C.CHANNELS)
    is_channel = channel < C.HEAD_DIM_V
    acc = tl.full([1, C.CHANNELS], 0.0, tl.float32)
    for start in range(0, n_splits, _SPLITS):
        split = start + tl.arange(0, _SPLITS)
        exists = split < n_splits
        part = split.to(tl.int64) * n_entries + entry
        sums = split_sums + part * 4
        largest = tl.load(sums, mask=exists, other=float("-inf"))
        kept = tl.load(sums + 1, mask=exists, other=0.0)
        pointers = split_out + part[:, None] * C.HEAD_DIM_V + channel[None, :]
        values = tl.load(pointers, mask=exists[:, None] & is_channel[None, :], other=0.0)
        running, pivot, alpha = rescale(running, tl.max(largest, 0))
        weight = tl.exp2(largest - pivot)
        total = total * alpha + tl.sum(weight * kept, 0)
        if C.SKIP:
            bound = bound * alpha + tl.sum(weight * tl.load(sums + 2, mask=exists, other=0.0), 0)
            lost = lost * alpha + tl.sum(weight * tl.load(sums + 3, mask=exists, other=0.0), 0)
        # Where nothing is kept, no values may have been stored.
        weighted = tl.where((kept != 0.0)[:, None], values * weight[:, None], 0.0)
        acc = acc * alpha + tl.sum(weighted, 0)[None, :]

    row = tl.load(q_start + sequence) + index + tl.arange(0, 1)
    sink = 0.0
    if C.HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
    store_finished(
        acc, total, running, bound, lost, sink, v_scale, row, row * 0 + head, row >= 0, channel, n_heads,
        out, out_strides, lse, dropped_bound, dropped, C,
    )  # fmt: skip


@triton.jit
def store_finished(
    acc, total, running, bound, lost, sink, v_scale, row, head, is_row, channel, n_heads,
    out, out_strides, lse, dropped_bound, dropped, C: tl.constexpr,
):  # fmt: skip
    """Divides by the normaliser, and stores what rows come to.

    Args:
        acc .. lost: as `attend_decode` returns them. sink: log2 sink logit. v_scale: multiplies the output.
        row, head: [BLOCK_M], where rows lie in the packed tensors. channel: those of `acc`.
    """
    values, row_lse, kept_sum, rescaled = finish(
        acc, total, running, lost, sink, v_scale, C.HAS_SINKS, C.EXACT
    )
    out_token, out_head = out_strides
    of_rows = out + row.to(tl.int64) * out_token + head.to(tl.int64) * out_head
    tl.store(
        of_rows[:, None] + channel[None, :],
        values.to(out.dtype.element_ty),
        mask=is_row[:, None] & (channel < C.HEAD_DIM_V)[None, :],
    )
    entry = row.to(tl.int64) * n_heads + head
    tl.store(lse + entry, row_lse, mask=is_row)
    if C.SKIP:
        if dropped_bound is not None:
            tl.store(dropped_bound + entry, share(bound * rescaled, kept_sum), mask=is_row)
        if dropped is not None:
            tl.store(dropped + entry, share(lost * rescaled, kept_sum), mask=is_row)


@triton.jit
def share(part, rest):
    """The share of `part` in the whole, 0 where there is nothing."""
    whole = part + rest
    return part / tl.where(whole == 0, 1.0, whole)

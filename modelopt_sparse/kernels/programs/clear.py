"""Zeros for the tokens that no sequence owns, and for tallies: all are allocated with anything in them."""

from __future__ import annotations

import triton
import triton.language as tl

from modelopt_sparse.kernels.device.run_time import RUN_TIME


@triton.jit(do_not_specialize=RUN_TIME)
def clear_kernel(
    x, x_strides, lse, y, y_strides, start, length, n_sequences, n_tokens, n_heads,
    counts, n_counts, more_counts, n_more_counts, shares, more_shares,
    DIM: tl.constexpr, BLOCK: tl.constexpr, DIM_Y: tl.constexpr, BLOCK_Y: tl.constexpr,
):  # fmt: skip
    """One program: 128 tokens.

    Args:
        x: [tokens, heads, DIM]. y: [tokens, heads, DIM_Y], or None.
        lse: [tokens, heads], where -inf is written; or None.
        start, length: int32 [sequences], the tokens of each.
        counts, more_counts: int64, so many; or None. shares, more_shares: fp32 [tokens, heads], or None.
        BLOCK, BLOCK_Y: powers of two that hold DIM and DIM_Y.
    """
    pid = tl.program_id(0)
    token = pid * 128 + tl.arange(0, 128)
    owned = token >= n_tokens
    for s in range(0, n_sequences):
        first = tl.load(start + s)
        owned = owned | ((token >= first) & (token < first + tl.load(length + s)))
    if tl.min(owned.to(tl.int32), 0) == 0:
        place = token.to(tl.int64)
        for head in range(0, n_heads):
            store_zeros(x, x_strides, place, owned, head, DIM, BLOCK)
            if lse is not None:
                tl.store(lse + place * n_heads + head, float("-inf"), mask=owned == 0)
            if y is not None:
                store_zeros(y, y_strides, place, owned, head, DIM_Y, BLOCK_Y)

    if pid == 0:
        clear(counts, n_counts)
        clear(more_counts, n_more_counts)
    first = pid.to(tl.int64) * 128 * n_heads
    count = tl.minimum(n_tokens - pid * 128, 128) * n_heads
    clear(shares + first if shares is not None else None, count)
    clear(more_shares + first if more_shares is not None else None, count)


@triton.jit
def clear(x, count):
    """Clears so many elements, if there is such a tensor."""
    if x is not None:
        for start in range(0, count, 128):
            place = start + tl.arange(0, 128)
            tl.store(x + place, tl.zeros([128], x.dtype.element_ty), mask=place < count)


@triton.jit
def store_zeros(x, strides, token, owned, head, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Clears one head of the tokens that are not owned."""
    per_token, per_head = strides
    channel = tl.arange(0, BLOCK)
    pointers = x + head * per_head + token[:, None] * per_token + channel[None, :]
    zeros = tl.full([128, BLOCK], 0.0, x.dtype.element_ty)
    tl.store(pointers, zeros, mask=(owned == 0)[:, None] & (channel < DIM)[None, :])

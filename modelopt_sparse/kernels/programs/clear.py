"""Zeros for the tokens that no sequence owns: outputs are allocated with anything in them."""

from __future__ import annotations

import triton
import triton.language as tl

from modelopt_sparse.kernels.device.run_time import RUN_TIME


@triton.jit(do_not_specialize=RUN_TIME)
def clear_kernel(
    x, x_strides, lse, y, y_strides, start, length, n_sequences, n_tokens, n_heads,
    DIM: tl.constexpr, BLOCK: tl.constexpr, DIM_Y: tl.constexpr, BLOCK_Y: tl.constexpr,
):  # fmt: skip
    """One program: 128 tokens.

    Args:
        x: [tokens, heads, DIM]. y: [tokens, heads, DIM_Y], or None.
        lse: [tokens, heads], where -inf is written; or None.
        start, length: int32 [sequences], the tokens of each.
        BLOCK, BLOCK_Y: powers of two that hold DIM and DIM_Y.
    """
    token = tl.program_id(0) * 128 + tl.arange(0, 128)
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


@triton.jit
def store_zeros(x, strides, token, owned, head, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Clears one head of the tokens that are not owned."""
    per_token, per_head = strides
    channel = tl.arange(0, BLOCK)
    pointers = x + head * per_head + token[:, None] * per_token + channel[None, :]
    zeros = tl.full([128, BLOCK], 0.0, x.dtype.element_ty)
    tl.store(pointers, zeros, mask=(owned == 0)[:, None] & (channel < DIM)[None, :])

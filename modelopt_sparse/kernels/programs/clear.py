"""Zeros for the tokens that no sequence owns: outputs are allocated with anything in them."""

from __future__ import annotations

import triton
import triton.language as tl

from modelopt_sparse.kernels.device.run_time import RUN_TIME


@triton.jit(do_not_specialize=RUN_TIME)
def clear_kernel(
    x, lse, strides, start, length, n_sequences, n_tokens, n_heads, DIM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: 128 tokens.

    Args:
        x: [tokens, heads, DIM]. lse: [tokens, heads], where -inf is written; or None.
        start, length: int32 [sequences], the tokens of each. BLOCK: a power of two that holds DIM.
    """
    token = tl.program_id(0) * 128 + tl.arange(0, 128)
    owned = token >= n_tokens
    for s in range(0, n_sequences):
        first = tl.load(start + s)
        owned = owned | ((token >= first) & (token < first + tl.load(length + s)))
    if tl.min(owned.to(tl.int32), 0) == 0:
        per_token, per_head = strides
        place = token.to(tl.int64)
        channel = tl.arange(0, BLOCK)
        inside = (owned == 0)[:, None] & (channel < DIM)[None, :]
        zeros = tl.full([128, BLOCK], 0.0, x.dtype.element_ty)
        for head in range(0, n_heads):
            pointers = x + head * per_head + place[:, None] * per_token + channel[None, :]
            tl.store(pointers, zeros, mask=inside)
            if lse is not None:
                tl.store(lse + place * n_heads + head, float("-inf"), mask=owned == 0)

"""Which row blocks see a key tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_block_limits(
    tile, base, first, n_q, n_k, window, num_sink_tokens, dense_window_size, C: tl.constexpr
):
    """The row blocks that see a key tile, where `causal` and `window` say so.

    Row blocks are counted from position `base`.

    Returns:
        first_block; and n_before, n_full, n_edges: how many blocks come before those of which every row sees
        every key of the tile and shields none of them from N:M, how many these are, and how many the others.
    """
    first_key = tile * C.BLOCK_N
    stop_key = tl.minimum(first_key + C.BLOCK_N, n_k)
    low = first
    high = first + n_q - 1
    full_low = first
    full_high = high
    if C.CAUSAL:
        low = tl.maximum(low, first_key)
        high = tl.minimum(high, stop_key - 2 + window)
        full_low = tl.maximum(full_low, first_key + C.BLOCK_N - 1)
        full_high = tl.minimum(full_high, first_key - 1 + window)
    if C.N > 0:
        full_low = tl.maximum(full_low, first_key + C.BLOCK_N - 1 + dense_window_size)
        full_high = tl.where(first_key < num_sink_tokens, -1, full_high)
    full_high = tl.where(first_key + C.BLOCK_N > n_k, -1, full_high)
    first_block = (low - base) // C.BLOCK_M
    n_blocks = tl.where(high >= low, (high - base) // C.BLOCK_M - first_block + 1, 0)
    full_first = (full_low - base + C.BLOCK_M - 1) // C.BLOCK_M
    n_full = tl.where(full_high >= full_low, (full_high + 1 - base) // C.BLOCK_M - full_first, 0)
    n_full = tl.maximum(n_full, 0)
    if C.ONLY_EDGES:
        n_full = n_full * 0
    return first_block, full_first - first_block, n_full, n_blocks - n_full

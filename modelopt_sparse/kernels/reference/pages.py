"""The reference of paged keys and values: packed copies of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from modelopt_sparse.kernels.check import FP8, Call


def gathered(call: Call) -> Call:
    """The same call on packed copies of the keys and values. Reads the lengths on the host."""
    if call.block_tables is None:
        return call
    page_size, seqs = call.k.shape[1], call.seqs
    lengths = seqs.k_len.tolist()

    def packed(x: Tensor, table: Tensor) -> Tensor:
        parts = []
        for row, n_k in zip(table.long(), lengths, strict=True):
            j = torch.arange(n_k, device=x.device)
            parts.append(x[row[j // page_size], j % page_size])
        return torch.cat(parts) if parts else x.new_zeros(0, *x.shape[2:])

    k, v = call.k, call.v
    if k.dtype == FP8 or call.v_scale != 1:
        dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
        k, v = k.to(dtype), v.to(dtype) * call.v_scale
    k, v = (packed(x, t) for x, t in zip((k, v), call.block_tables, strict=True))
    k_start = (seqs.k_len.cumsum(0) - seqs.k_len).int()
    return call._replace(
        k=k, v=v, block_tables=None, v_scale=1.0, seqs=replace(seqs, k_start=k_start)
    )

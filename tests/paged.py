"""Packed keys and values, put into pages."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modelopt_sparse.kernels import DENSE, AttentionOutput, PagedKV, Seqs
from modelopt_sparse.kernels.backends import run_triton
from modelopt_sparse.kernels.check import Call, checked

LAYOUTS = ("nhd", "hnd", "together", "two_tables")


def in_pages(
    k: Tensor, v: Tensor, seqs: Seqs, page_size: int, layout: str = "nhd", seed: int = 0, spare: int = 3
) -> PagedKV:  # fmt: skip
    """The same keys in pages that are scattered, with NaN in every slot that holds none.

    Args:
        layout: "nhd": heads within a token. "hnd": tokens within a head. "together": K and V in one
            tensor [pages, 2, Hk, page_size, D]. "two_tables": values lie in other pages than keys.
        spare: pages that nobody owns.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = seqs.k_len.tolist()
    columns = max(1, -(-max([*lengths, seqs.max_k]) // page_size))
    needed = [-(-n // page_size) for n in lengths]
    pages = sum(needed) + spare

    def table() -> Tensor:
        order = iter(torch.randperm(pages, generator=generator).tolist())
        # Entries behind the last one in use are no pages at all.
        rows = [[next(order) for _ in range(n)] + [2**31 - 1] * (columns - n) for n in needed]
        return torch.tensor(rows, dtype=torch.int32, device=k.device).view(len(needed), columns)

    k_table = table()
    v_table = table() if layout == "two_tables" else k_table

    def empty(dim: int) -> Tensor:
        shape = (pages, page_size, k.shape[1], dim)
        if layout == "nhd" or layout == "two_tables":
            return torch.full(shape, math.nan, dtype=k.dtype, device=k.device)
        shape = (pages, 2, shape[2], page_size, dim)
        both = torch.full(shape, math.nan, dtype=k.dtype, device=k.device)
        return both[:, 0].transpose(1, 2)

    k_pages, v_pages = empty(k.shape[-1]), empty(v.shape[-1])
    if layout == "together" and k.shape == v.shape:
        both = torch.full(
            (pages, 2, k.shape[1], page_size, k.shape[-1]), math.nan, dtype=k.dtype, device=k.device
        )
        k_pages, v_pages = both[:, 0].transpose(1, 2), both[:, 1].transpose(1, 2)
    for x, cache, where in ((k, k_pages, k_table), (v, v_pages, v_table)):
        for b, (start, n) in enumerate(zip(seqs.k_start.tolist(), lengths, strict=True)):
            j = torch.arange(n, device=k.device)
            cache[where[b].long()[j // page_size], j % page_size] = x[start : start + n]
    return PagedKV(k_pages, v_pages, k_table, None if v_table is k_table else v_table)


def paged_triton(q: Tensor, cache: PagedKV, seqs: Seqs, plan=DENSE, **options) -> AttentionOutput:
    """`attention_paged` by the Triton kernels, in Triton's interpreter too."""
    call = Call(q, cache.k, cache.v, seqs, plan, block_tables=cache.block_tables, **options)
    return run_triton(checked(call))

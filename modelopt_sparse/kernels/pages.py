"""Keys and values in pages: a cache of which each sequence owns pages anywhere, found by its block table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_sparse.errors import ArgumentError, describe

from .types import Seqs


@dataclass(frozen=True, eq=False)
class PagedKV:
    """A paged cache. Key ``j`` of sequence ``b`` is slot ``j % page_size`` of page
    ``block_table[b, j // page_size]``.

    Args:
        k: [pages, page_size, Hk, D], last dim contiguous, other strides any: one tensor may hold K and V,
            and `from_hnd` takes pages whose heads come first.
        v: [pages, page_size, Hk, Dv].
        block_table: int32 [B, pages of a sequence], numbers of pages of `k`. Entries behind a sequence's
            last key aren't read.
        v_block_table: the same for `v`; None: those of `k`.
        k_scale, v_scale: what stored keys and values are multiplied with; for float8_e4m3fn, which `k` and
            `v` may hold beside queries of any other dtype.
    """

    k: Tensor
    v: Tensor
    block_table: Tensor
    v_block_table: Tensor | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0

    @classmethod
    def from_hnd(
        cls,
        k: Tensor,
        v: Tensor,
        block_table: Tensor,
        v_block_table: Tensor | None = None,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> PagedKV:
        """A cache whose pages have their heads first: k [pages, Hk, page_size, D]. Nothing is copied."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        return cls(k, v, block_table, v_block_table, k_scale, v_scale)

    @classmethod
    def from_latent(
        cls, latents: Tensor, value_dim: int, block_table: Tensor, latent_scale: float = 1.0
    ) -> PagedKV:
        """A cache of latents, as multi-head latent attention keeps: one head, whose keys hold its values.

        Sequences that decode load both at once. The queries are the absorbed ones; give their ``scale``,
        which isn't D ** -0.5.

        Args:
            latents: [pages, page_size, D], the latent and then the rotary channels: 512 + 64.
            value_dim: channels of the latent.
            latent_scale: what stored latents are multiplied with, see `k_scale`.
        Source: DeepSeek-V2 (arXiv 2405.04434).
        """
        keys = latents.unsqueeze(2)
        return cls(keys, keys[..., :value_dim], block_table, None, latent_scale, latent_scale)

    @property
    def block_tables(self) -> tuple[Tensor, Tensor]:
        """The table of `k`, and that of `v`."""
        own = self.block_table
        return own, own if self.v_block_table is None else self.v_block_table

    def check(self, seqs: Seqs) -> None:
        """Looks at every length, and at every entry of the tables that is in use. Waits for the device.

        Raises:
            ArgumentError: a sequence has more keys than pages, or a page that isn't there.
        """
        check_entries(self.k, self.v, self.block_tables, seqs)


def check_entries(k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor], seqs: Seqs) -> None:
    """Raises the ArgumentError of `PagedKV.check`."""
    page_size = k.shape[1]
    for name, pages, table in (("block_table", k, tables[0]), ("v_block_table", v, tables[1])):
        most = min(seqs.max_k, table.shape[1] * page_size)
        bad = (seqs.k_len < 0) | (seqs.k_len > most)
        if bool(bad.any()):
            raise ArgumentError(
                describe("seqs.k_len", int(seqs.k_len[bad][0]), f"lengths in [0, {most}]")
            )
        place = torch.arange(table.shape[1], device=table.device) * page_size
        outside = (table < 0) | (table >= pages.shape[0])
        outside &= place < seqs.k_len[:, None]
        if bool(outside.any()):
            sequence, column = outside.nonzero()[0].tolist()
            got = f"{int(table[sequence, column])} at [{sequence}, {column}]"
            raise ArgumentError(describe(name, got, f"pages in [0, {pages.shape[0]})"))

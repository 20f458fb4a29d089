"""The reference: attention as the contract words it, in plain torch, on any device.

It walks row blocks, so that memory grows with the number of keys and not with rows times keys. Every
kernel is held to it: what a faster kernel keeps, skips and returns is what this code does. It reads the
lengths on the host.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from modelopt_sparse.kernels.check import Call
from modelopt_sparse.kernels.device.bins import BINS
from modelopt_sparse.kernels.types import (
    AttentionOutput,
    SkipSoftmax,
    SkipSoftmaxDecode,
    TileCounts,
    TileMap,
)

from .block import ALIGN, Block, attend_block
from .pages import gathered
from .rules import Rules
from .sequence import Sequence

# Scores of one row block: 64 MiB in fp32, and a handful of such tensors live at once.
BLOCK_SCORES = 2**24


def run(call: Call) -> AttentionOutput:
    """Computes a checked call."""
    call = gathered(call)
    seqs, heads = call.seqs, call.q.shape[1]
    spans = torch.stack([seqs.q_start, seqs.q_len, seqs.k_start, seqs.k_len], 1).tolist()
    dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    out = call.q.new_zeros(call.q.shape[0], heads, call.v.shape[-1])
    lse = torch.full(call.q.shape[:2], -torch.inf, dtype=dtype, device=call.q.device)
    skip, skip_decode, tiles = call.plan.skip, call.plan.skip_decode, call.plan.tiles
    dropped, bound = torch.zeros_like(lse), torch.zeros_like(lse)
    given = (None,) * len(spans) if tiles is None else replace(tiles, seqs=seqs).unpacked()
    kept: list[Tensor | None] = []
    kept_decode: list[Tensor | None] = []
    prefill: TileCounts | None = None
    decode: TileCounts | None = None

    for index, (q_start, n_q, k_start, n_k) in enumerate(spans):
        rules = Rules.of(call, index, n_q, given[index])
        q_span, k_span = slice(q_start, q_start + n_q), slice(k_start, k_start + n_k)
        sequence = Sequence.of(call, index, q_span, k_span, ALIGN)
        blocks = [attend_block(sequence, rules, rows) for rows in _row_blocks(sequence, rules)]
        if blocks:
            out[q_span] = torch.cat([block.out for block in blocks]).to(out.dtype)
            lse[q_span] = torch.cat([block.lse for block in blocks])
        for block in blocks:
            rows = slice(q_start + block.rows.start, q_start + block.rows.stop)
            if rules.skip is not None and block.dropped is not None and block.bound is not None:
                dropped[rows], bound[rows] = block.dropped, block.bound
        is_prefill = isinstance(rules.skip, SkipSoftmax)
        if is_prefill:
            prefill = _add_counts(prefill, blocks, rules)
        elif rules.skip is not None:
            decode = _add_counts(decode, blocks, rules)
        decided = _kept_tiles(blocks, sequence, rules) if call.details else None
        kept.append(decided if is_prefill else None)
        kept_decode.append(None if is_prefill else decided)

    if skip is None and skip_decode is None:
        return AttentionOutput(out, lse, tiles=tiles if call.details else None)
    if not call.details:
        return AttentionOutput(out, lse, prefill, decode, dropped_mass_bound=bound)
    if skip is not None:
        tiles = _tile_map(call, kept, skip.block_rows, skip.block_keys)
    tiles_decode = None
    if skip_decode is not None:
        tiles_decode = _tile_map(call, kept_decode, None, skip_decode.block_keys)
    return AttentionOutput(out, lse, prefill, decode, tiles, tiles_decode, dropped, bound)


def _tile_map(
    call: Call, kept: list[Tensor | None], block_rows: int | None, block_keys: int
) -> TileMap:
    rows, heads = call.q.shape[:2]
    return TileMap.from_kept(
        kept,
        call.seqs,
        call.causal,
        block_rows,
        block_keys,
        rows=rows,
        heads=heads,
        phase=call.phase,
    )


def _row_blocks(sequence: Sequence, rules: Rules) -> list[slice]:
    """Consecutive rows, cut at multiples of `ALIGN` on the position, of about `BLOCK_SCORES` scores."""
    n_q = len(sequence.rows)
    if n_q == 0:
        return []
    if isinstance(rules.skip, SkipSoftmaxDecode):
        # All rows that decode vote together.
        return [slice(0, n_q)]
    scores_per_row = sequence.q.shape[1] * max(sequence.k.shape[1], 1)
    size = max(1, BLOCK_SCORES // scores_per_row // ALIGN) * ALIGN
    cuts = range(size - int(sequence.rows[0]) % ALIGN, n_q, size)
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, n_q], strict=True)]


def _add_counts(total: TileCounts | None, blocks: list[Block], rules: Rules) -> TileCounts:
    assert rules.log2_thresholds is not None and rules.skip is not None
    if total is None:
        none = torch.zeros_like(rules.log2_thresholds, dtype=torch.int64)
        heads = none.shape[1]
        histogram = none.new_zeros(BINS, heads) if rules.skip.histogram else None
        total = TileCounts(none[0], none, histogram)
    for decisions in (block.decisions for block in blocks):
        if decisions is not None:
            visible, skipped = (x.sum((-2, -1)) for x in decisions[:2])
            total += TileCounts(visible, skipped, decisions.histogram())
    return total


def _kept_tiles(blocks: list[Block], sequence: Sequence, rules: Rules) -> Tensor | None:
    """The decision bitmap: bool [Hq, row tiles, key tiles] of a sequence, None where nothing is decided."""
    if rules.skip is None:
        return None
    n_row_tiles = int(rules.row_tile(sequence, slice(0, None))[-1]) + 1 if len(sequence.rows) else 0
    n_key_tiles = -(-sequence.n_k // rules.block_keys)
    heads = sequence.q.shape[1]
    kept = torch.zeros(
        (heads, n_row_tiles, n_key_tiles), dtype=torch.bool, device=sequence.q.device
    )
    for block in blocks:
        if block.decisions is None:
            continue
        visible, skipped, _ = block.decisions
        row = int(rules.row_tile(sequence, block.rows)[0])
        tile = block.first_key // rules.block_keys
        stays = (visible & ~skipped[0])[..., : n_key_tiles - tile]
        kept[:, row : row + stays.shape[1], tile : tile + stays.shape[2]] = stays
    return kept

"""Decision tiles as bits of words, the way `TileMap` describes them, written down a second time."""

from __future__ import annotations

import numpy as np
import torch

from modelopt_sparse.kernels.types import Phase, Seqs, TileMap

SUPER = 128  # positions that share a slot for each of their row tiles


def spans(seqs: Seqs) -> list[tuple[int, int, int, int]]:
    """Of each sequence: first row, rows, first key, keys."""
    columns = (seqs.q_start, seqs.q_len, seqs.k_start, seqs.k_len)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def packed_tiles(
    kept: list,
    seqs: Seqs,
    rows: int,
    heads: int,
    block_rows: int | None,
    block_keys: int,
    causal: bool,
) -> torch.Tensor:
    """The words of a `TileMap`.

    Args:
        kept: for each sequence bool [Hq, row tiles, key tiles], or None. rows: of q.
        block_rows: None where the rows of a sequence are one tile.
    """
    batch, n_words = len(seqs.q_len), -(-seqs.max_k // (32 * block_keys))
    parts = 1 if block_rows is None else SUPER // block_rows
    n_super = min(rows // SUPER + 2 * batch, batch * (-(-seqs.max_q // SUPER) + 1))
    slots = batch if block_rows is None else n_super * parts
    words = np.zeros((slots, heads, n_words), dtype=np.uint32)
    first_super = 0
    for b, (tiles, (_, n_q, _, n_k)) in enumerate(zip(kept, spans(seqs), strict=True)):
        first = n_k - n_q if causal else 0
        slot = b
        if block_rows is not None:
            slot = first_super * parts + first % SUPER // block_rows
            first_super += (first + n_q - 1) // SUPER - first // SUPER + 1 if n_q else 0
        if tiles is None or 0 in tiles.shape:
            continue
        bits = tiles.cpu().numpy().transpose(1, 0, 2)  # [row tiles, Hq, key tiles]
        padding = (0, n_words * 32 - bits.shape[2])
        bits = np.pad(bits, ((0, 0), (0, 0), padding))
        packed = np.ascontiguousarray(np.packbits(bits, axis=-1, bitorder="little")).view("<u4")
        words[slot : slot + len(bits)] = packed
    return torch.from_numpy(words.view(np.int32))


def tile_map(
    kept: list,
    seqs: Seqs,
    rows: int,
    heads: int,
    blocks: tuple[int, int],
    causal: bool,
    phase: Phase | None,
) -> TileMap:
    """A `TileMap` of these tiles, on the device of the sequences."""
    words = packed_tiles(kept, seqs, rows, heads, *blocks, causal)
    return TileMap(words.to(seqs.q_len.device), seqs, causal, *blocks, phase)


def row_tile_of(n_q: int, n_k: int, causal: bool, block_rows: int | None) -> torch.Tensor:
    """The row tile of each row of a sequence, counted from its first row's: int64 [n_q]."""
    if block_rows is None:
        return torch.zeros(n_q, dtype=torch.int64)
    position = torch.arange(n_q) + (n_k - n_q if causal else 0)
    tile = position.div(block_rows, rounding_mode="floor")
    return tile - tile[:1]


def tile_shape(
    n_q: int, n_k: int, causal: bool, block_rows: int | None, block_keys: int
) -> tuple[int, int]:
    """Row tiles and key tiles of a sequence."""
    row_tiles = int(row_tile_of(n_q, n_k, causal, block_rows)[-1]) + 1 if n_q else 0
    return row_tiles, -(-n_k // block_keys)

"""Where the bit of a decision tile lies: row tiles have slots, key tiles have bits of 32-bit words.

Positions are cut at multiples of `SUPER_ROWS`, counted from position 0 of each sequence; the pieces that
hold rows of a sequence follow one another, sequence after sequence, and each has the slots of all its row
tiles. How many slots are enough follows from host numbers, so no call waits for lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

SUPER_ROWS = 128
WORD_BITS = 32


def slot_count(rows: int, batch: int, max_q: int, block_rows: int | None) -> int:
    """How many slots hold the row tiles of any sequences that fit these numbers.

    Args:
        rows: of ``q``, all sequences together. max_q: upper bound of a sequence's.
        block_rows: rows of a row tile; None: a sequence is one row tile.
    """
    if block_rows is None:
        return batch
    # A sequence of n rows touches at most ceil(n / SUPER_ROWS) + 1 pieces, wherever it begins.
    pieces = min(rows // SUPER_ROWS + 2 * batch, batch * (-(-max_q // SUPER_ROWS) + 1))
    return pieces * (SUPER_ROWS // block_rows)


def word_count(max_k: int, block_keys: int) -> int:
    """How many words hold one bit for each key tile of the longest sequence."""
    return -(-max_k // (block_keys * WORD_BITS))


def row_tile_spans(
    q_len: Tensor, k_len: Tensor, causal: bool, block_rows: int | None
) -> tuple[Tensor, Tensor]:
    """For each sequence, the slot of its first row's tile and its number of row tiles: int64 [B] both.

    The row tiles of a sequence have consecutive slots.
    """
    n_q = q_len.long()
    if block_rows is None:
        return torch.arange(len(n_q), device=n_q.device), (n_q > 0).long()
    first_row = k_len.long() - n_q if causal else torch.zeros_like(n_q)
    last_row = first_row + n_q - 1

    def count(size: int) -> Tensor:
        spanned = _floor(last_row, size) - _floor(first_row, size) + 1
        return spanned.masked_fill(n_q == 0, 0)

    pieces = count(SUPER_ROWS)
    first_piece = pieces.cumsum(0) - pieces
    within = _floor(first_row - _floor(first_row, SUPER_ROWS) * SUPER_ROWS, block_rows)
    return first_piece * (SUPER_ROWS // block_rows) + within, count(block_rows)


def _floor(x: Tensor, size: int) -> Tensor:
    return x.div(size, rounding_mode="floor")


def packed_bits(flags: Tensor, words: int) -> Tensor:
    """bool [..., T] as int32 [..., words], flag t in bit t % 32 of word t // 32; the rest is 0."""
    spare = words * WORD_BITS - flags.shape[-1]
    whole = torch.nn.functional.pad(flags, (0, spare)).view(*flags.shape[:-1], words, WORD_BITS)
    place = torch.arange(WORD_BITS, device=flags.device)
    values = (whole.long() << place).sum(-1)
    return (values - ((values >> (WORD_BITS - 1)) << WORD_BITS)).int()  # bit 31 is the sign


def unpacked_bits(words: Tensor, tiles: int) -> Tensor:
    """The first `tiles` flags of int32 [..., words]: bool [..., tiles]."""
    place = torch.arange(WORD_BITS, device=words.device)
    flags: Tensor = ((words[..., None] >> place) & 1).bool()
    return flags.flatten(-2)[..., :tiles]

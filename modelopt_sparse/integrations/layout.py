"""Which rows and keys of a padded batch belong to which sequence, read off any form of mask."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from modelopt_sparse.kernels.types import Seqs

_NOTE = "_modelopt_note"


@dataclass(frozen=True, eq=False)
class MaskNote:
    """What goes with a mask from layer to layer: all those of a forward pass get the same one.

    Args:
        packed_numbers: of a dense mask: the number of each token's sequence, [B, Lkv], where several are
            packed in one batch item, for the mask can't say where their grids begin; else None.
        readings: what was read off the mask, by what it was read for.
    """

    packed_numbers: Tensor | None = None
    readings: dict[Any, Any] = field(default_factory=dict)


def add_note(mask: Tensor, packed_numbers: Tensor | None = None) -> MaskNote:
    """Attaches a note on which nothing was read yet."""
    note = MaskNote(packed_numbers)
    setattr(mask, _NOTE, note)
    return note


def note_of(mask: Tensor) -> MaskNote | None:
    """The note attached to a mask, or None."""
    note: MaskNote | None = getattr(mask, _NOTE, None)
    return note


@dataclass(frozen=True, eq=False)
class Layout:
    """S sequences in a batch of B items, each with Lq rows and Lkv keys.

    Sequence ``s`` owns rows ``row[s] : row[s] + n_q[s]`` and keys ``key[s] : key[s] + n_k[s]`` of
    the batch item ``item[s]``. Row ``i`` of a causal sequence is at position ``n_k - n_q + i``.

    Args:
        item, row, n_q, key, n_k: int32 or int64 [S].
        bounds: int64 [B, Lq, 2], the keys [start, end) that a row sees, counted from its sequence's
            first; None where causality, or the sequence alone, says it.
        max_q, max_k: upper bounds of n_q and n_k, in tokens. min_q: lower bound of those n_q that aren't 0.
        is_one_per_item: ``item`` is 0, 1, ... B - 1.
    """

    item: Tensor
    row: Tensor
    n_q: Tensor
    key: Tensor
    n_k: Tensor
    bounds: Tensor | None
    max_q: int
    max_k: int
    is_one_per_item: bool = True
    min_q: int = 0

    def seqs(self, n_rows: int, item_step: int) -> Seqs:
        """The sequences, in packed tensors that hold an item every `n_rows` rows and `item_step` keys."""
        return Seqs(
            torch.add(self.row, self.item, alpha=n_rows).int(),
            self.n_q.int(),
            torch.add(self.key, self.item, alpha=item_step).int(),
            self.n_k.int(),
            self.max_q,
            self.max_k,
            self.min_q,
        )


def whole_items(batch: int, n_q: int, n_kv: int, device: torch.device) -> Layout:
    """Without a mask: every item is one sequence."""
    # Every layer asks, so few kernels are launched: none of them converts.
    item = torch.arange(batch, dtype=torch.int32, device=device)
    none, rows, keys = (torch.full_like(item, n) for n in (0, n_q, n_kv))
    return Layout(item, none, rows, none, keys, None, n_q, n_kv, min_q=n_q)


def end_to_end(
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, intervals: Tensor | None = None
) -> Layout:
    """The sequences that lie end to end in the only batch item.

    Args:
        cu_q, cu_k: cumulative lengths of rows and keys, [S + 1].
        max_q, max_k: the longest of each, in tokens.
        intervals: int [1, Lq, 2], the keys [start, end) of the item that each row sees at most.
    """
    cu_q, cu_k = cu_q.long(), cu_k.long()
    row, key, n_k = cu_q[:-1], cu_k[:-1], cu_k.diff()
    bounds = None
    if intervals is not None:
        index = torch.arange(intervals.shape[1], device=intervals.device)
        sequence = torch.searchsorted(cu_q[1:], index, right=True).clamp(max=len(row) - 1)
        bounds = (intervals.long() - key[sequence][:, None]).clamp(min=0)
        bounds = torch.minimum(bounds, n_k[sequence][:, None])
    return Layout(torch.zeros_like(row), row, cu_q.diff(), key, n_k, bounds, max_q, max_k, False)


def from_intervals(mask: Tensor, n_kv: int, causal: bool) -> Layout:
    """One sequence for each item, without the padding.

    Without causality, and with as many rows as keys, rows before the first and after the last
    attended key become sequences of their own. In self-attention they are padding, so the others
    sit on the grid as they would without it; in cross-attention they are tokens, so they must be
    computed.

    Args:
        mask: int32 [B, Lq, 4], (start, end, position, origin) of each row; see `masks.interval_mask`.
        n_kv: keys that each item hands over.
        causal: rows are tokens of the keys' sequence; those at either end that see nothing are
            padding.
    """
    start, end, position, origin = mask.unbind(-1)  # [B, Lq] each
    batch, n_rows = start.shape
    item = torch.arange(batch, dtype=torch.int32, device=mask.device)
    sees = end > start
    key = origin[:, 0]
    stop = torch.where(sees, end, key[:, None]).amax(-1)  # one past the last key that any row sees
    if not causal:
        bounds = _bounds(start, end, key)
        if n_rows != n_kv:
            none = torch.zeros_like(item)
            return Layout(item, none, none + n_rows, key, stop - key, bounds, n_rows, n_kv)
        item, key, stop = item.repeat(3), key.repeat(3), stop.repeat(3)
        first, last = key[:batch], torch.maximum(stop, key)[:batch]
        row = torch.cat([torch.zeros_like(first), first, last])
        row_stop = torch.cat([first, last, torch.full_like(last, n_rows)])
        return Layout(item, row, row_stop - row, key, stop - key, bounds, n_rows, n_kv, False)

    if n_rows == 1:  # in decode, the same in fewer kernels
        row, n_q = torch.zeros_like(item), sees[:, 0].int()
        first_position = last_position = position[:, 0]
    else:
        row = sees.byte().argmax(-1)
        row_stop = torch.where(sees.any(-1), n_rows - sees.flip(-1).byte().argmax(-1), row)
        n_q = row_stop - row
        first_position = position.gather(1, row[:, None])[:, 0]
        last_position = position.gather(1, (row_stop - 1).clamp(min=0)[:, None])[:, 0]
    # A row before the origin that sees keys (no transformers mask has one) moves the origin to it.
    has_rows = n_q > 0
    shift = (-first_position).clamp(min=0) * has_rows
    key = (key - shift).clamp(min=0)
    n_k = torch.minimum(torch.maximum(last_position + shift + 1, stop - key), n_kv - key)
    return Layout(item, row, n_q, key, n_k * has_rows, _bounds(start, end, key), n_rows, n_kv)


def from_packed_intervals(mask: Tensor) -> Layout:
    """Several sequences in each item, as many rows as keys. Reads their number on the host.

    Args:
        mask: int [B, Lq, 5], (start, end, position, origin, sequence) of each row.
    """
    start, end, _, origin, number = mask.long().unbind(-1)  # [B, Lq] each
    n_rows = start.shape[1]
    begins = number != number.roll(1, -1)
    begins[:, 0] = True
    item, row = begins.nonzero(as_tuple=True)
    flat = item * n_rows + row
    n_q = torch.cat([flat[1:], flat.new_tensor([mask.shape[0] * n_rows])]) - flat
    longest = int(n_q.max())
    bounds = torch.stack([start, end], -1) - origin[..., None]
    return Layout(item, row, n_q, origin[item, row], n_q, bounds, longest, longest, False)


def from_packed_visible(numbers: Tensor) -> Layout:
    """Several sequences in each item, whose visible keys a dense mask says.

    Args:
        numbers: int [B, Lq], the number of the sequence that each token belongs to.
    """
    origin = first_index_of_run(numbers)
    rows = torch.stack([origin, origin, origin, origin, numbers], -1)
    layout = from_packed_intervals(rows)
    end = layout.n_q.repeat_interleave(layout.n_q).view(numbers.shape)
    return replace(layout, bounds=torch.stack([torch.zeros_like(end), end], -1))


def first_index_of_run(numbers: Tensor) -> Tensor:
    """For each entry of [B, L], the index at which its run of equal numbers begins."""
    index = torch.arange(numbers.shape[-1], device=numbers.device).expand_as(numbers)
    begins = numbers != numbers.roll(1, -1)
    begins[:, :1] = True
    return torch.where(begins, index, 0).cummax(-1).values


def from_visible(visible: Tensor, causal: bool) -> Layout:
    """One sequence for each item, from the first key that any row sees.

    Args:
        visible: bool [B, heads, Lq, Lkv], which keys each row sees. Hidden keys stay hidden by a
            grid.
        causal: rows are the last tokens that the mask shows; else row i is at position i.
    """
    seen = visible.any(1)  # [B, Lq, Lkv]
    batch, n_rows, n_kv = seen.shape
    index = torch.arange(n_rows, device=seen.device)
    item = torch.arange(batch, device=seen.device)
    any_row, any_key = seen.any(-1), seen.any(-2)  # [B, Lq], [B, Lkv]
    first_key = any_key.byte().argmax(-1)  # [B]
    key_stop = torch.where(any_key.any(-1), n_kv - any_key.flip(-1).byte().argmax(-1), first_key)
    if not causal:
        none = torch.zeros_like(item, dtype=torch.int32)
        bounds = _everything(key_stop - first_key, n_rows)
        return Layout(
            item, none, none + n_rows, first_key.int(), key_stop - first_key, bounds, n_rows, n_kv
        )

    last_key = n_kv - 1 - seen.flip(-1).byte().argmax(-1)  # [B, Lq]
    offset = (last_key - index).where(any_row, -n_rows).amax(-1).clamp(max=n_kv - n_rows)
    first_row = any_row.byte().argmax(-1)
    # No row that sees a key lies before the origin.
    key = torch.minimum(first_key, (first_row + offset).clamp(min=0))
    row = (key - offset).clamp(min=0)
    n_k = torch.maximum(n_rows + offset, key_stop) - key
    has_keys = any_key.any(-1)
    n_q, n_k = (n_rows - row).where(has_keys, 0), n_k.where(has_keys, 0)
    # As grids want them, for each layer.
    return Layout(item, row.int(), n_q, key.int(), n_k, _everything(n_k, n_rows), n_rows, n_kv)


def _bounds(start: Tensor, end: Tensor, key: Tensor) -> Tensor:
    """Intervals of the key tensor, counted from each item's first key: [B, Lq, 2]."""
    return (torch.stack([start, end], -1) - key[:, None, None]).clamp(min=0)


def _everything(n_k: Tensor, n_rows: int) -> Tensor:
    """Bounds that hide nothing: [B, Lq, 2]."""
    end = n_k[:, None].expand(-1, n_rows)
    return torch.stack([torch.zeros_like(end), end], -1)

"""From a padded batch of heads-first tensors to the kernels' packed sequences, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modelopt_sparse.errors import ArgumentError, describe
from modelopt_sparse.kernels.types import ScoreGrid, Seqs

from .capture import is_capturing
from .layout import (
    Layout,
    add_note,
    end_to_end,
    from_intervals,
    from_packed_intervals,
    from_packed_visible,
    from_visible,
    note_of,
    whole_items,
)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A call in the kernels' form.

    Args:
        q: [B * Lq, Hq, D]; k: [Tk, Hk, D]; v: [Tk, Hk, Dv]. The heads of ``k`` and ``v`` may overlap.
        seqs: where each sequence lies. Rows that are padding belong to none.
        bounds: int32 [B * Lq, 2] or None.
        mask, bias: grids with one entry for each sequence, or None.
        batch: B.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    seqs: Seqs
    bounds: Tensor | None
    mask: ScoreGrid | None
    bias: ScoreGrid | None
    batch: int

    def unpack(self, out: Tensor) -> Tensor:
        """[B * Lq, Hq, Dv] to [B, Lq, Hq, Dv], contiguous."""
        return out.view(self.batch, -1, *out.shape[1:]).contiguous()


@dataclass(frozen=True, eq=False)
class Visibility:
    """Everything that says which keys a row sees.

    Args:
        attention_mask: None; an interval mask, int32 [B or 1, 1, Lq, 4 or 5]; or bool or additive
            float, broadcastable to [B, Hq, Lq, Lkv].
        causal: whether rows are the last tokens of the keys' sequence.
        position_bias: float, broadcastable to [B, Hq, Lq, Lkv], added to the scores.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: cumulative lengths [S + 1] of the
            sequences in the only batch item, and the longest. They narrow what a mask shows.
    """

    attention_mask: Tensor | None = None
    causal: bool = True
    position_bias: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    cu_seq_lens_k: Tensor | None = None
    max_length_q: int | None = None
    max_length_k: int | None = None


@dataclass(frozen=True, eq=False)
class _Reading:
    """What says which keys a row sees, as kernels take it. The same for all layers of a forward pass.

    Args:
        bounds: int32 [B * Lq, 2] or None.
        reader: who asked first.
    """

    layout: Layout
    seqs: Seqs
    bounds: Tensor | None
    reader: int | None

    def grid(self, values: Tensor | None) -> ScoreGrid | None:
        """`values` [1 or B, heads, Lq, Lkv] as a grid with one entry for each sequence."""
        if values is None:
            return None
        layout = self.layout
        if values.shape[0] == 1:
            values = values.expand(len(layout.item), -1, -1, -1)
        elif not layout.is_one_per_item:
            values = values[layout.item]
        return ScoreGrid(values, layout.row.int(), layout.key.int())


def pack(
    query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, reader: int | None = None
) -> PackedBatch:
    """Packs a batch without copying keys and values, where their strides allow.

    Args:
        query: [B, Hq, Lq, D]; key: [B, Hk, Lkv, D]; value: [B, Hk, Lkv, Dv], any strides. A batch
            of 1 in some of them broadcasts.
        visibility: masks and what else says which keys a row sees.
        reader: who asks. A mask is read once for all who ask, until the first of them asks again.
    Raises:
        ArgumentError: a mask or bias has a shape or dtype that is not taken.
    """
    batch = max(query.shape[0], key.shape[0])
    query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    shape = torch.Size((batch, query.shape[1], query.shape[2], key.shape[2]))  # of a score tensor
    visible, bias = _grids(visibility, shape)
    k, v, item_step = _packed_keys(key, value)
    reading = _reading(visibility, visible, shape, item_step, query.device, reader)
    return PackedBatch(
        q=query.transpose(1, 2).reshape(batch * shape[2], shape[1], -1),
        k=k,
        v=v,
        seqs=reading.seqs,
        bounds=reading.bounds,
        mask=reading.grid(visible) if bias is None else None,
        bias=reading.grid(bias),
        batch=batch,
    )


def _grids(visibility: Visibility, shape: torch.Size) -> tuple[Tensor | None, Tensor | None]:
    """The visible keys and what is added to the scores, of a mask that is not one of intervals.

    Returns:
        visible: bool [1 or B, 1 or Hq, Lq, Lkv] or None.
        bias: the same in a float dtype, with -inf where `visible` is False; or None.
    """
    mask, bias = visibility.attention_mask, visibility.position_bias
    if bias is not None:
        bias = _fitting("position_bias", bias, shape)
        if not bias.is_floating_point():
            raise ArgumentError(describe("position_bias", bias.dtype, "a float dtype"))
    if mask is None or mask.dtype == torch.int32:
        return None, bias
    if mask.dtype == torch.bool:
        visible = _fitting("attention_mask", mask, shape)
        return visible, None if bias is None else bias.masked_fill(~visible, -torch.inf)
    if not mask.is_floating_point():
        takes = "bool (True sees), a float dtype (added to the scores), or an interval mask"
        raise ArgumentError(describe("attention_mask", mask.dtype, takes))
    added = _fitting("attention_mask", mask, shape)
    # Half of the least number, so that biases that were added to it still count as hidden.
    visible = added > torch.finfo(mask.dtype).min / 2
    bias = added if bias is None else added + bias
    return visible, bias.masked_fill(~visible, -torch.inf)


def _reading(
    visibility: Visibility,
    visible: Tensor | None,
    shape: torch.Size,
    item_step: int,
    device: torch.device,
    reader: int | None,
) -> _Reading:
    """Reads the mask; one that our mask function made, once for all the layers that get it.

    Who asks again is in another forward pass, before which others may have written to the mask. What a
    CUDA graph computes has values only when it is replayed, and what was read before it would be old then.
    """
    mask, kept, name = visibility.attention_mask, None, None
    if mask is not None and visibility.cu_seq_lens_q is None and not torch.compiler.is_compiling():
        note = note_of(mask)
        if note is None and mask.dtype == torch.int32:
            note = add_note(mask)
        kept = None if note is None else note.readings
    if kept is not None:
        name = (shape, visibility.causal, item_step, is_capturing(device))
        found: _Reading | None = kept.get(name)
        if found is not None and (reader is None or found.reader != reader):
            return found
    layout = _layout(visibility, visible, shape, device)
    bounds = None if layout.bounds is None else layout.bounds.reshape(-1, 2).int()
    reading = _Reading(layout, layout.seqs(shape[2], item_step), bounds, reader)
    if kept is not None:
        kept[name] = reading
    return reading


def _layout(
    visibility: Visibility, visible: Tensor | None, shape: torch.Size, device: torch.device
) -> Layout:
    """What the mask, or the lengths, say."""
    batch, _, n_q, n_kv = shape
    mask, causal = visibility.attention_mask, visibility.causal
    cu_seqlens = _cu_seqlens(visibility, shape)
    if cu_seqlens is not None:
        if mask is None:
            return end_to_end(*cu_seqlens)
        if visible is not None:
            bounds = torch.tensor([0, n_kv], device=device).expand(1, n_q, 2)
            return replace(end_to_end(*cu_seqlens), bounds=bounds)
        return end_to_end(*cu_seqlens, _interval_rows(mask, shape)[..., :2])
    if mask is None:
        return whole_items(batch, n_q, n_kv, device)
    if visible is not None:
        note = note_of(mask)
        if note is not None and note.packed_numbers is not None:
            return from_packed_visible(note.packed_numbers)
        return from_visible(visible.expand(batch, -1, -1, -1), causal)

    rows = _interval_rows(mask, shape)
    return (
        from_packed_intervals(rows) if rows.shape[-1] == 5 else from_intervals(rows, n_kv, causal)
    )


def _cu_seqlens(
    visibility: Visibility, shape: torch.Size
) -> tuple[Tensor, Tensor, int, int] | None:
    """Cumulative lengths of rows and keys and the longest of each, where they are given."""
    cu_q, cu_k = visibility.cu_seq_lens_q, visibility.cu_seq_lens_k
    if cu_q is None and cu_k is None:
        return None
    for name, value in (("cu_seq_lens_q", cu_q), ("cu_seq_lens_k", cu_k)):
        ints = isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)
        if value is None or not ints or value.dim() != 1:
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            takes = "an int32 tensor [sequences + 1], together with the other of the pair"
            raise ArgumentError(describe(name, got, takes))
    for name, longest in (
        ("max_length_q", visibility.max_length_q),
        ("max_length_k", visibility.max_length_k),
    ):
        if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int)):
            raise ArgumentError(describe(name, repr(longest), "an int or None"))
    assert cu_q is not None and cu_k is not None
    if shape[0] != 1 or cu_q.shape != cu_k.shape:
        got = f"a batch of {shape[0]}, {len(cu_q) - 1} row and {len(cu_k) - 1} key lengths"
        raise ArgumentError(describe("cu_seq_lens", got, "a batch of 1 and as many of each"))
    for name, cu, total in (("cu_seq_lens_q", cu_q, shape[2]), ("cu_seq_lens_k", cu_k, shape[3])):
        if cu.device.type == "cpu" and cu[[0, -1]].tolist() != [0, total]:
            raise ArgumentError(describe(name, cu.tolist(), f"0, ..., {total}"))
    max_q, max_k = visibility.max_length_q, visibility.max_length_k
    return cu_q, cu_k, max_q or shape[2], max_k or shape[3]


def _interval_rows(mask: Tensor, shape: torch.Size) -> Tensor:
    """The interval mask without its head dim: int32 [B, Lq, 4 or 5]."""
    batch, _, n_q, _ = shape
    fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] == 1
    if not fits or mask.shape[2] != n_q or mask.shape[3] not in (4, 5):
        takes = f"an int32 interval mask [{batch}, 1, {n_q}, 4], or a bool or float mask"
        raise ArgumentError(describe("attention_mask", f"int32 {tuple(mask.shape)}", takes))
    return mask[:, 0].expand(batch, -1, -1)


def _fitting(name: str, values: Tensor, shape: torch.Size) -> Tensor:
    """`values` expanded to [1 or B, 1 or Hq, Lq, Lkv]."""
    fits = values.dim() == 4 and all(
        have in (1, want) for have, want in zip(values.shape, shape, strict=True)
    )
    if not fits:
        takes = f"4 dimensions that broadcast to {tuple(shape)}"
        raise ArgumentError(describe(name, f"shape {tuple(values.shape)}", takes))
    return values.expand(-1, -1, *shape[2:])


def _packed_keys(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
    """Keys and values as [Tk, Hk, D], and how many packed rows lie between two batch items.

    A step between items that is a whole number of steps between keys makes the batch one long
    sequence of keys in memory, whose heads overlap. Autograd and compilers handle such views badly.
    """
    batch, _, n_kv, _ = key.shape
    if batch == 1:
        return key[0].transpose(0, 1), value[0].transpose(0, 1), n_kv
    wants_grad = torch.is_grad_enabled() and (key.requires_grad or value.requires_grad)
    step = None if wants_grad or torch.compiler.is_compiling() else _item_step(key)
    if step is not None and step == _item_step(value):
        return _overlapping(key, step), _overlapping(value, step), step
    k, v = (x.transpose(1, 2).reshape(batch * n_kv, x.shape[1], x.shape[3]) for x in (key, value))
    return k, v, n_kv


def _item_step(x: Tensor) -> int | None:
    """Keys that fit between two batch items of [B, Hk, L, D], if that is a whole number."""
    step, key_step = x.stride(0), x.stride(2)
    return step // key_step if x.stride(3) == 1 and key_step > 0 and step % key_step == 0 else None


def _overlapping(x: Tensor, item_step: int) -> Tensor:
    """[B, Hk, L, D] as a view [(B - 1) * item_step + L, Hk, D]."""
    batch, heads, length, dim = x.shape
    return x.as_strided(
        ((batch - 1) * item_step + length, heads, dim), (x.stride(2), x.stride(1), 1)
    )

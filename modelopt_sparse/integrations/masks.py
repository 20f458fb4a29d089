"""The mask function registered with transformers: per row an interval of keys, or a dense mask.

transformers describes a mask as a function of (batch, head, query index, key index). Nearly all of
them show each row one run of keys, so two numbers a row say it all: 1 MB at 128k tokens, where a
dense mask is 17 GB, and a kernel reads its tile bounds off it. A mask with holes stays dense.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, prepare_padding_mask

from .capture import is_capturing
from .layout import add_note, first_index_of_run
from .runs import dense_mask, packed_numbers, runs_of_rows

# The model types whose masks tests/conformance compares with eager attention. Others, which may do
# anything with the mask between building it and attending, get the dense mask that sdpa would.
INTERVAL_FAMILIES = frozenset(
    {
        "bart",
        "bert",
        "clip_vision_model",
        "cohere",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gpt2",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "llama",
        "llama4_text",
        "mistral",
        "mixtral",
        "modernbert",
        "olmo2",
        "opt",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
        "smollm3",
        "starcoder2",
        "t5",
        "vit",
        "whisper",
    }
)


class _Padding(NamedTuple):
    """What the 2-D mask shows of the keys handed over: [first, last) of each item."""

    first: Tensor  # [B]
    last: Tensor  # [B]
    has_hole: bool
    is_absent: bool


def interval_mask(**kwargs: Any) -> Tensor | None:
    """Builds the attention mask of one forward pass; the `AttentionMaskInterface` entry.

    Args:
        kwargs: what transformers gives to every mask function: batch_size, q_length, kv_length,
            q_offset (an int, or a 0-dim tensor with static caches), kv_offset, mask_function,
            attention_mask (bool [B, tokens] or None), local_size, allow_is_causal_skip,
            allow_is_bidirectional_skip, use_vmap, device, config.
    Returns:
        None: every row sees all keys up to its own, the last row all of them (causal), or every
        row sees every key (bidirectional); only where the caller allows to leave the mask out.
        int32 [B, 1, Lq, 4], columns (start, end, position, origin): the row sees keys [start, end)
        of the key tensor, none where start == end; its own position counts from key `origin`, the
        first attended one of its sequence. With sequences packed in one batch item, int32 [B, 1,
        Lq, 5], whose last column numbers the item's sequences. Rows that are padding see nothing.
        bool [B, 1, Lq, Lkv]: the visible keys, where they are not one run in each row.
    """
    batch, n_q = kwargs["batch_size"], kwargs["q_length"]
    kwargs.setdefault("mask_function", causal_mask_function)
    kwargs.setdefault("device", "cpu")
    tracing = torch.compiler.is_compiling()
    family = getattr(kwargs.get("config"), "model_type", None)
    padded = kwargs.get("attention_mask") is not None
    if tracing and (padded or family not in INTERVAL_FAMILIES):
        return dense_mask(kwargs)
    number = None if tracing else packed_numbers(kwargs["mask_function"])
    # Whether padding has holes would have to be read, which a CUDA graph can't.
    if family not in INTERVAL_FAMILIES or (padded and is_capturing(torch.device(kwargs["device"]))):
        return _noted(dense_mask(kwargs), number)
    padding = _read_padding(kwargs)
    if padding.is_absent and _may_be_left_out(kwargs):
        return None
    runs = None if padding.has_hole else runs_of_rows(kwargs)
    if runs is None:
        return dense_mask(kwargs) if tracing else _noted(dense_mask(kwargs), number)

    index = torch.arange(n_q, device=runs.device)
    row = index + kwargs.get("q_offset", 0) - kwargs.get("kv_offset", 0)
    row = row.expand(batch, -1)  # [B, Lq], where the row's own key lies in the key tensor
    first, last = padding.first[:, None], padding.last[:, None]
    start, end = torch.maximum(runs[..., 0], first), torch.minimum(runs[..., 1], last)
    if "allow_is_bidirectional_skip" not in kwargs and padded:
        # Rows of a causal mask are tokens of the keys' sequence: the 2-D mask tells the padding.
        end = end.where((row >= first) & (row < last), start)
    end = torch.maximum(start, end)
    if number is None:
        columns = [start, end, row - first, first.expand_as(row)]
    else:
        number = number.expand(batch, -1)
        origin = first_index_of_run(number)
        columns = [start, end, row - origin, origin, number]
    return torch.stack(columns, -1)[:, None].int()


def _noted(mask: Tensor, number: Tensor | None) -> Tensor:
    """The dense mask, with a note that all layers share it, and of packed sequences' numbers."""
    add_note(mask, None if number is None else number.expand(len(mask), -1))
    return mask


def _may_be_left_out(kwargs: dict[str, Any]) -> bool:
    """Whether no mask says the same as this unpadded one, and the caller allows it."""
    n_q, n_kv, local_size = kwargs["q_length"], kwargs["kv_length"], kwargs.get("local_size")
    if local_size is not None and n_kv >= local_size:
        return False
    if kwargs.get("allow_is_bidirectional_skip", False):
        return True
    q_offset, kv_offset = kwargs.get("q_offset", 0), kwargs.get("kv_offset", 0)
    # A static cache hands over its whole capacity, and its offset is a tensor.
    return (
        kwargs.get("allow_is_causal_skip", True)
        and (n_q == 1 or n_q == n_kv)
        and isinstance(q_offset, int)
        and q_offset + n_q == kv_offset + n_kv
    )


def _read_padding(kwargs: dict[str, Any]) -> _Padding:
    """Reads the 2-D mask: one transfer to the host, and none without such a mask."""
    batch, n_kv, kv_offset = kwargs["batch_size"], kwargs["kv_length"], kwargs.get("kv_offset", 0)
    mask = prepare_padding_mask(kwargs.get("attention_mask"), n_kv, kv_offset)
    if mask is None:
        first = torch.zeros(batch, dtype=torch.int64, device=kwargs["device"])
        return _Padding(first, torch.full_like(first, n_kv), has_hole=False, is_absent=True)
    mask = mask[:, kv_offset : kv_offset + n_kv].to(kwargs["device"]).bool()
    mask = mask.expand(batch, -1)
    count = mask.sum(-1)
    first = mask.byte().argmax(-1)
    last = torch.where(count > 0, n_kv - mask.flip(-1).byte().argmax(-1), first)
    flags = torch.stack([(last - first != count).any(), (count == n_kv).all()])
    has_hole, is_absent = flags.tolist()
    return _Padding(first, last, has_hole, is_absent)

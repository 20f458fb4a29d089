"""Which run of keys a mask function of transformers shows each row, without a dense mask."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

MaskFunction = Callable[..., Tensor]

# Mask functions of transformers that show a row one run of keys, around its own index, by qualified
# name. An intersection of such runs is one again.
_RUNS = frozenset(
    {
        "causal_mask_function",
        "bidirectional_mask_function",
        "sliding_window_overlay.<locals>.inner_mask",
        "sliding_window_bidirectional_overlay.<locals>.inner_mask",
        "chunked_overlay.<locals>.inner_mask",
        "packed_sequence_mask_function.<locals>.inner_mask",
    }
)
_CAUSAL = frozenset({"causal_mask_function"})
_PACKED = "packed_sequence_mask_function.<locals>.inner_mask"
_INTERSECTIONS = frozenset(
    {
        "and_masks.<locals>.and_mask",
        "remap_positions_for_packed_sequence.<locals>.inner_mask",
    }
)

# Up to this many (row, key) pairs a dense evaluation is fewer operations than a search.
_DENSE_PAIRS = 2**18
# Rows of one dense evaluation hold about this many (row, key) pairs.
_CHUNK_PAIRS = 2**24
# Halvings that find one of any number of keys. The number itself may be symbolic while tracing.
_TRACED_STEPS = 31


def dense_mask(kwargs: dict[str, Any]) -> Tensor:
    """The mask that sdpa attention gets, never left out: bool [B, 1, Lq, Lkv]."""
    mask = sdpa_mask(
        **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    )
    assert mask is not None
    return mask.expand(kwargs["batch_size"], -1, kwargs["q_length"], kwargs["kv_length"])


def runs_of_rows(kwargs: dict[str, Any]) -> Tensor | None:
    """The run of keys that each row sees, the 2-D mask aside.

    Args:
        kwargs: see `masks.interval_mask`.
    Returns:
        int64 [B, Lq, 2], (start, end) in the key tensor; None if some row's keys are not one run.
    """
    by_index = not kwargs.get("use_vmap", False)
    if torch.compiler.is_compiling():
        # Closures cannot be looked into; an overlay is the outermost function, a union.
        is_run = _is_named(kwargs["mask_function"], _RUNS | _INTERSECTIONS)
        return _search(kwargs, _TRACED_STEPS) if is_run and by_index else None
    if _is_named(kwargs["mask_function"], _CAUSAL):
        return _up_to_their_own(kwargs)
    is_run = all(_is_named(leaf, _RUNS) for leaf in _leaves(kwargs["mask_function"]))
    if is_run and by_index and kwargs["q_length"] * kwargs["kv_length"] > _DENSE_PAIRS:
        return _search(kwargs, kwargs["kv_length"].bit_length())
    return _evaluate(kwargs, check=not is_run)


def packed_numbers(function: MaskFunction) -> Tensor | None:
    """The number of the sequence that each token belongs to, [B or 1, L], where some are packed."""
    for leaf in _leaves(function):
        if _is_named(leaf, frozenset({_PACKED})):
            numbers: Tensor = leaf.__closure__[0].cell_contents
            return numbers
    return None


def _up_to_their_own(kwargs: dict[str, Any]) -> Tensor:
    """The run of keys that each row of a causal mask sees: int64 [B, Lq, 2], possibly past the last key."""
    before = kwargs.get("q_offset", 0) - kwargs.get("kv_offset", 0)
    end = torch.arange(1, kwargs["q_length"] + 1, device=kwargs["device"]) + before
    end = end.expand(kwargs["batch_size"], -1)
    return torch.stack([torch.zeros_like(end), end], -1)


def _search(kwargs: dict[str, Any], steps: int) -> Tensor:
    """The run of keys that each row sees, by bisection around the key nearest to its own index.

    O(Lq log Lkv). A row that does not see that nearest key sees none: every function in `_RUNS`
    shows a run that holds the row's own index.

    Returns:
        int64 [B, Lq, 2], (start, end) in the key tensor.
    """
    device, n_kv = kwargs["device"], kwargs["kv_length"]
    low: int = kwargs.get("kv_offset", 0)
    mask_function: MaskFunction = kwargs["mask_function"]
    batch = torch.arange(kwargs["batch_size"], device=device)[:, None]  # [B, 1]
    head = torch.zeros((), dtype=torch.int64, device=device)
    row = torch.arange(kwargs["q_length"], device=device) + kwargs.get("q_offset", 0)
    row = row.expand(len(batch), -1)  # [B, Lq]

    def sees(key: Tensor) -> Tensor:
        seen: Tensor = mask_function(batch, head, row, key).expand_as(key)
        return seen

    nearest = row.clamp(low, low + n_kv - 1)
    below, start = torch.full_like(nearest, low), nearest
    last, above = nearest, torch.full_like(nearest, low + n_kv - 1)
    for _ in range(steps):
        middle = (below + start) // 2
        seen = sees(middle)
        start, below = torch.where(seen, middle, start), torch.where(seen, below, middle + 1)
        below = torch.minimum(below, start)
        middle = (last + above + 1) // 2
        seen = sees(middle)
        last, above = torch.where(seen, middle, last), torch.where(seen, above, middle - 1)
        above = torch.maximum(above, last)
    end = torch.where(sees(nearest), last + 1, start)
    return torch.stack([start, end], -1) - low


def _evaluate(kwargs: dict[str, Any], check: bool) -> Tensor | None:
    """The run of keys that each row sees, by evaluating all pairs of row and key, rows in chunks.

    Args:
        check: make sure that the visible keys are one run; reads the answer on the host.
    Returns:
        int64 [B, Lq, 2], (start, end) in the key tensor; None if some row's keys are not one run.
    """
    n_q, n_kv, q_offset = kwargs["q_length"], kwargs["kv_length"], kwargs.get("q_offset", 0)
    rows = max(1, _CHUNK_PAIRS // max(n_kv, 1))
    spans: list[Tensor] = []
    for begin in range(0, n_q, rows):
        part = {
            **kwargs,
            "attention_mask": None,
            "q_length": min(rows, n_q - begin),
            "q_offset": q_offset + begin,
        }
        seen = dense_mask(part)[:, 0]  # [B, rows, Lkv]
        start, count = seen.byte().argmax(-1), seen.sum(-1)
        if check:
            last = n_kv - seen.flip(-1).byte().argmax(-1)
            if not bool(((last - start == count) | (count == 0)).all()):
                return None
        spans.append(torch.stack([start, start + count], -1))
    return torch.cat(spans, 1)


def _leaves(function: Any) -> list[Any]:
    """The mask functions that `function` is the intersection of; itself if it is none."""
    if not _is_named(function, _INTERSECTIONS):
        return [function]
    leaves: list[Any] = []
    for cell in function.__closure__ or ():
        content = cell.cell_contents
        parts = content if isinstance(content, tuple) else (content,)
        leaves += [leaf for part in parts if callable(part) for leaf in _leaves(part)]
    return leaves


def _is_named(function: object, names: frozenset[str]) -> bool:
    """Whether `function` is the one of transformers with such a qualified name. Can be traced."""
    if not isinstance(function, FunctionType):
        return False
    # torch before 2.13 can't trace the module of a function, nor its own qualified name. Functions of
    # users come with use_vmap.
    theirs = torch.compiler.is_compiling() or function.__module__ == sdpa_mask.__module__
    return theirs and function.__code__.co_qualname in names

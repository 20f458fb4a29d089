"""A call as an operator of torch takes it: tensors and lists of numbers. And back.

Lists, for the cost of calling an operator grows with the square of its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .check import Call
from .types import NMSparsity, Phase, Plan, ScoreGrid, Seqs, SkipSoftmax, SkipSoftmaxDecode, TileMap

_PHASES = (None, Phase.PREFILL, Phase.DECODE)
# In place of a threshold: there is none, or it is a tensor.
_NO_NUMBER = -1.0


class FlatCall(NamedTuple):
    """A call, spread out.

    Args:
        q, k, v, sinks, bias: those tensors of a call that may want a gradient.
        tensors: the others, as far as there are any.
        ints, floats: its numbers.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    bias: Tensor | None
    tensors: list[Tensor]
    ints: list[int]
    floats: list[float]


def flatten(call: Call) -> FlatCall:
    """The tensors and the numbers of a call."""
    seqs, plan = call.seqs, call.plan
    nm, skip, decode, tiles = plan.nm, plan.skip, plan.skip_decode, plan.tiles
    skip_number, skip_tensor, skip_counted = _threshold(skip, call.q.device)
    decode_number, decode_tensor, decode_counted = _threshold(decode, call.q.device)
    tensors = (
        seqs.q_start, seqs.q_len, seqs.k_start, seqs.k_len, call.bounds, *_grid(call.mask),
        *_grid(call.bias)[1:], skip_tensor, decode_tensor, None if tiles is None else tiles.words,
        *(call.block_tables or (None, None)),
    )  # fmt: skip
    assert call.scale is not None
    ints = [
        seqs.max_q, seqs.max_k, seqs.min_q, _PHASES.index(call.phase), int(call.causal), int(call.details),
        call.window or 0,
        *((nm.n, nm.m, nm.num_sink_tokens, nm.dense_window_size) if nm else (0, 0, 0, 0)),
        *((skip.block_rows, skip.block_keys, int(skip.exact_normalizer), int(skip.histogram))
          if skip else (0, 0, 0, 0)),
        len(skip_counted),
        *((decode.block_keys, decode.segment_keys, decode.vote_heads or 0, int(decode.exact_normalizer),
           int(decode.histogram)) if decode else (0, 0, 0, 0, 0)),
        *((tiles.block_rows or 0, tiles.block_keys) if tiles else (0, 0)),
        sum((x is not None) << i for i, x in enumerate(tensors)),
    ]  # fmt: skip
    floats = [call.scale, call.softcap or 0.0, call.v_scale, skip_number, decode_number]
    return FlatCall(
        call.q,
        call.k,
        call.v,
        call.sinks,
        None if call.bias is None else call.bias.values,
        [x for x in tensors if x is not None],
        ints,
        [*floats, *skip_counted, *decode_counted],
    )


def unflatten(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None,
    tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float],
) -> Call:  # fmt: skip
    """The call that `flatten` took apart."""
    (
        max_q, max_k, min_q, in_phase, causal, details, window, n, m, num_sink_tokens, dense_window_size,
        rows, keys, exact, histogram, n_counted,
        decode_keys, segment_keys, vote_heads, decode_exact, decode_histogram,
        given_rows, given_keys, present,
    ) = ints  # fmt: skip
    scale, softcap, v_scale, skip_number, decode_number, *counted = floats
    found = iter(tensors)
    (
        q_start, q_len, k_start, k_len, bounds, mask, mask_rows, mask_keys, bias_rows, bias_keys,
        skip_tensor, decode_tensor, words, k_table, v_table,
    ) = (next(found) if present >> i & 1 else None for i in range(15))  # fmt: skip
    assert q_start is not None and q_len is not None and k_start is not None and k_len is not None
    seqs = Seqs(q_start, q_len, k_start, k_len, max_q, max_k, min_q)
    phase = _PHASES[in_phase]
    skip = decode = tiles = None
    if keys:
        value = skip_number if skip_number != _NO_NUMBER else skip_tensor
        skip = SkipSoftmax(
            value, rows, keys, tuple(counted[:n_counted]), bool(exact), histogram=bool(histogram)
        )
    if decode_keys:
        value = decode_number if decode_number != _NO_NUMBER else decode_tensor
        decode = SkipSoftmaxDecode(
            value, decode_keys, segment_keys, vote_heads or None, tuple(counted[n_counted:]),
            bool(decode_exact), histogram=bool(decode_histogram),
        )  # fmt: skip
    if words is not None:
        tiles = TileMap(words, seqs, bool(causal), given_rows or None, given_keys, phase)
    nm = NMSparsity(n, m, num_sink_tokens, dense_window_size) if m else None
    return Call(
        q, k, v, seqs, Plan(nm, skip, decode, tiles), bool(causal), scale, window or None, softcap or None,
        sinks, bounds,
        None if mask is None else ScoreGrid(mask, mask_rows, mask_keys),
        None if bias is None else ScoreGrid(bias, bias_rows, bias_keys),
        phase, bool(details), None if k_table is None or v_table is None else (k_table, v_table), v_scale,
    )  # fmt: skip


def _threshold(
    part: SkipSoftmax | SkipSoftmaxDecode | None, device: torch.device
) -> tuple[float, Tensor | None, tuple[float, ...]]:
    """A threshold as a number or as a tensor, and the further ones that are counted."""
    if part is None:
        return _NO_NUMBER, None, ()
    value = part.threshold
    if isinstance(value, float) and torch.compiler.is_compiling():
        # A number would be a constant of the graph, which other numbers would compile again. In
        # torch.full, and whatever else makes a tensor of a number, it stays one.
        value = torch.ones((), dtype=torch.float64, device=device) * value
    if isinstance(value, Tensor):
        return _NO_NUMBER, value, part.count_thresholds
    return (_NO_NUMBER if value is None else value), None, part.count_thresholds


def _grid(scores: ScoreGrid | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if scores is None:
        return None, None, None
    return scores.values, scores.row_start, scores.key_start

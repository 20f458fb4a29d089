"""Whether a result is right, before it is timed: sampled rows and heads against fp32 mathematics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modelopt_sparse.kernels import Plan, Seqs, attention_reference

from .inputs import KEYS, ROWS, Inputs

DENSE_ERROR = 0.005
"""Relative L2 error that a bf16 kernel stays under; they have 0.002."""
NM_ERROR = 0.02
"""The same with N:M, where rounding may choose another of two equal scores."""
GRADIENT_ERROR = 0.01
DIAL_ERROR = 0.03
"""How far the counted share of skipped tiles may lie from the dial."""


def relative_error(got: Tensor, exact: Tensor) -> float:
    """L2, relative; NaN if anything isn't finite."""
    got, exact = got.double(), exact.double()
    return float((got - exact).norm() / exact.norm())


def sampled_rows(inputs: Inputs) -> list[tuple[int, slice]]:
    """(sequence, rows of it) at the start, in the middle and at the end; each within one row tile."""
    by_length = sorted(range(len(inputs.lengths)), key=lambda i: inputs.lengths[i])
    chosen = sorted({by_length[0], by_length[len(by_length) // 2], by_length[-1]})
    sample = []
    for index in chosen:
        n = inputs.lengths[index]
        last = (n - 1) // ROWS
        for tile in sorted({0, last // 3, last // 2, last}):
            sample.append((index, slice(tile * ROWS, min(n, tile * ROWS + ROWS))))
    return sample


def forward_error(
    inputs: Inputs, out: Tensor, kept: Sequence[Tensor | None] | None = None
) -> float:
    """Largest error of `out` [T, Hq, D] over sampled row tiles, against the softmax of the kept tiles."""
    errors = [0.0]
    for index, rows in sampled_rows(inputs):
        first = inputs.spans[index].start
        span = slice(first, first + rows.stop) if inputs.causal else inputs.spans[index]
        tiles = None if kept is None else kept[index]
        if tiles is not None:
            tiles = tiles[:, rows.start // ROWS : rows.start // ROWS + 1]
        here = slice(first + rows.start, first + rows.stop)
        q, k, v = (x.float() for x in (inputs.q[here], inputs.k[span], inputs.v[span]))
        errors.append(relative_error(out[here], _attend(q, k, v, tiles, inputs.causal)))
    return _largest(errors)


def chunk_error(inputs: Inputs, rows: int, out: Tensor, kept: Tensor | None = None) -> float:
    """Largest error of `out` [rows, Hq, D], the last rows of one sequence, over sampled row tiles.

    Args:
        rows: of the chunk, which begins on a row tile. kept: bool [Hq, row tiles of the chunk, key tiles].
    """
    (length,) = inputs.lengths
    errors = [0.0]
    last = (rows - 1) // ROWS
    for tile in sorted({0, last // 2, last}):
        here = slice(length - rows + tile * ROWS, min(length, length - rows + (tile + 1) * ROWS))
        tiles = None if kept is None else kept[:, tile : tile + 1]
        q, k, v = (
            inputs.q[here].float(),
            inputs.k[: here.stop].float(),
            inputs.v[: here.stop].float(),
        )
        mine = out[here.start - length + rows : here.stop - length + rows]
        errors.append(relative_error(mine, _attend(q, k, v, tiles)))
    return _largest(errors)


def planned_error(inputs: Inputs, out: Tensor, plan: Plan) -> float:
    """The same against the torch reference with `plan`, which sees the rows as a chunk of the sequence."""
    errors = [0.0]
    for index, rows in sampled_rows(inputs):
        first = inputs.spans[index].start
        span = slice(first, first + rows.stop)
        here = slice(first + rows.start, first + rows.stop)
        seqs = Seqs.from_lengths([rows.stop - rows.start], [rows.stop], inputs.q.device)
        q, k, v = (x.float() for x in (inputs.q[here], inputs.k[span], inputs.v[span]))
        errors.append(relative_error(out[here], attention_reference(q, k, v, seqs, plan=plan).out))
    return _largest(errors)


def gradient_error(
    inputs: Inputs, d_out: Tensor, gradients: Sequence[Tensor], kept: Tensor | None = None
) -> float:
    """Largest error of dq, dk, dv of the first and the last KV head. One sequence."""
    errors = [0.0]
    group = inputs.group
    for head in sorted({0, inputs.k.shape[1] - 1}):
        of_q, of_k = slice(head * group, head * group + group), slice(head, head + 1)
        parts = (inputs.q[:, of_q], inputs.k[:, of_k], inputs.v[:, of_k])
        leaves = q, k, v = tuple(x.detach().float().requires_grad_() for x in parts)
        out = _attend(q, k, v, None if kept is None else kept[of_q])
        exact = torch.autograd.grad(out, leaves, d_out[:, of_q].float())
        mine = (gradients[0][:, of_q], gradients[1][:, of_k], gradients[2][:, of_k])
        errors += [relative_error(a, b) for a, b in zip(mine, exact, strict=True)]
    return _largest(errors)


def _largest(errors: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _attend(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor | None, causal: bool = True) -> Tensor:
    """Attention of the last R positions: q [R, Hq, D], k [N, Hk, D] and v [N, Hk, Dv] -> [R, Hq, Dv].

    Args:
        tiles: bool [Hq, row tiles, key tiles], the first row tile being that of the first row.
    """
    rows, heads, dim = q.shape
    keys, kv_heads = k.shape[:2]
    grouped = q.transpose(0, 1).reshape(kv_heads, -1, dim)  # [Hk, g * R, D]
    scores = (grouped @ k.permute(1, 2, 0)).view(heads, rows, keys) * dim**-0.5
    position = torch.arange(keys, device=q.device)
    seen = (position <= position[keys - rows :, None])[None] | (not causal)
    if tiles is not None:
        by_row = tiles.repeat_interleave(ROWS, 1)[:, :rows]
        seen = seen & by_row.repeat_interleave(KEYS, 2)[..., :keys]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out: Tensor = weights.view(kv_heads, -1, keys) @ v.transpose(0, 1)  # [Hk, g * R, D]
    return out.view(heads, rows, -1).transpose(0, 1)

"""What a call must return, given the tiles that it kept: plain softmax attention over a matrix of scores.

In float64 it is the truth; in a smaller dtype it is the measure of how much rounding is normal there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from modelopt_sparse.kernels.reference.nm import nm_hidden
from tests.gpu.build import Setup
from tests.gpu.tiles import row_tile_of, spans

LOG2E = math.log2(math.e)


@dataclass
class Sheet:
    """One sequence's scores.

    Args:
        rows, keys: its places in the packed tensors.
        x: float64 [Hq, n_q, n_k], log2; -inf where hidden.
        left: bool, what visibility, given tiles and N:M leave. used: less the skipped tiles.
        error: [Hq, n_q, n_k], how far rounding may move a score.
        unsure: bool [n_q, Hq], rows in which rounding may change what N:M leaves.
        skip: the part of the plan that decides over its tiles, or None.
    """

    index: int
    rows: slice
    keys: slice
    decodes: bool
    x: torch.Tensor
    left: torch.Tensor
    used: torch.Tensor
    error: torch.Tensor
    unsure: torch.Tensor
    skip: object = None


def scores(setup: Setup, b: int, rows: slice, keys: slice) -> torch.Tensor:
    """Scores of a sequence in natural units, nothing hidden: [Hq, n_q, n_k], float32 or float64."""
    wide = torch.float64 if setup.q.dtype == torch.float64 else torch.float32
    group = setup.q.shape[1] // setup.k.shape[1]
    q = setup.q[rows].to(wide).transpose(0, 1)
    k = setup.k[keys].to(wide).transpose(0, 1).repeat_interleave(group, 0)
    s = q @ k.transpose(1, 2) * setup.scale
    softcap, bias = setup.options.get("softcap"), setup.options.get("bias")
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + grid_part(bias, b, rows, keys).to(wide)
    return s


def grid_part(grid, b: int, rows: slice, keys: slice) -> torch.Tensor:
    """The grid's values of a sequence: [1 or Hq, n_q, n_k]."""
    r = 0 if grid.row_start is None else int(grid.row_start[b])
    c = 0 if grid.key_start is None else int(grid.key_start[b])
    n_q, n_k = rows.stop - rows.start, keys.stop - keys.start
    return grid.values[b, :, r : r + n_q, c : c + n_k]


def visible(setup: Setup, b: int, rows: slice, keys: slice) -> torch.Tensor:
    """Which keys each row sees: bool [1 or Hq, n_q, n_k]."""
    options, device = setup.options, setup.q.device
    n_q, n_k = rows.stop - rows.start, keys.stop - keys.start
    p = torch.arange(n_q, device=device)[:, None] + (n_k - n_q if setup.causal else 0)
    j = torch.arange(n_k, device=device)
    if "bounds" in options:
        start, stop = options["bounds"][rows].long().split(1, 1)
        seen = (j >= start) & (j < stop)
    elif setup.causal:
        seen = (j <= p) & (j > p - options.get("window", n_q + n_k))
    else:
        seen = (j >= 0).expand(n_q, n_k)
    seen = seen[None]
    if "mask" in options:
        seen = seen & grid_part(options["mask"], b, rows, keys)
    if "bias" in options:
        seen = seen & (grid_part(options["bias"], b, rows, keys) != -math.inf)
    return seen


def rounding(setup: Setup, b: int, rows: slice, keys: slice, x: torch.Tensor) -> torch.Tensor:
    """How far from `x` a score in float32 may lie: few units where the dot products are exact."""
    group = setup.q.shape[1] // setup.k.shape[1]
    q = setup.q[rows].double().abs().transpose(0, 1)
    k = setup.k[keys].double().abs().transpose(0, 1).repeat_interleave(group, 0)
    units = 4 if setup.grained else 8 + setup.q.shape[-1] / 8
    error = q @ k.transpose(1, 2) * (abs(setup.scale) * LOG2E * units)
    error = error + 4 * x.abs().nan_to_num(0.0, 0.0, 0.0)
    if setup.options.get("softcap") is not None:
        error = error + 16 * setup.options["softcap"] * LOG2E
    return error * 2.0**-23


def sheets_of(setup: Setup, kept: list | tuple | None) -> list[Sheet]:
    """The scores of each sequence, with the tiles that a call kept (None: nothing was skipped)."""
    wide = setup.widened()
    found = []
    with torch.no_grad():
        for b, (q0, n_q, k0, n_k) in enumerate(spans(setup.seqs)):
            rows, keys = slice(q0, q0 + n_q), slice(k0, k0 + n_k)
            decodes = setup.decodes(n_q)
            seen = visible(setup, b, rows, keys)
            x = (scores(wide, b, rows, keys) * LOG2E).masked_fill(~seen, -math.inf)
            error = rounding(setup, b, rows, keys, x)
            left = (x > -math.inf) | x.isnan()
            unsure = left.new_zeros(n_q, left.shape[0])
            given = setup.plan.tiles
            if given is not None and setup.given[b] is not None:
                size = (given.block_rows, given.block_keys)
                left = left & expand(setup.given[b].to(x.device), n_q, n_k, setup.causal, *size)
                x = x.masked_fill(~left, -math.inf)
            if setup.plan.nm is not None and not decodes:
                left, unsure = nm_left(setup, x, error, n_q, n_k)
            sheet = Sheet(b, rows, keys, decodes, x, left, left, error, unsure)
            skip = setup.plan.skip_decode if decodes else setup.plan.skip
            if skip is not None:
                block_rows = None if decodes else skip.block_rows
                tiles = kept[b]
                used = left & expand(tiles, n_q, n_k, setup.causal, block_rows, skip.block_keys)
                sheet = replace(sheet, used=used, skip=skip)
            found.append(sheet)
    return found


def expand(tiles, n_q, n_k, causal, block_rows, block_keys) -> torch.Tensor:
    """Tiles [Hq, row tiles, key tiles] as keys [Hq, n_q, n_k]."""
    row = row_tile_of(n_q, n_k, causal, block_rows).to(tiles.device)
    return tiles[:, row].repeat_interleave(block_keys, 2)[..., :n_k]


def nm_left(setup: Setup, x, error, n_q: int, n_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys that N:M leaves, and the rows in which a group's choice is a matter of rounding."""
    nm = setup.plan.nm
    if n_k == 0 or n_q == 0:
        return x > -math.inf, torch.zeros(n_q, x.shape[0], dtype=torch.bool, device=x.device)
    p = torch.arange(n_q, device=x.device) + (n_k - n_q if setup.causal else 0)
    wide = pad(x, (0, -n_k % nm.m), value=-math.inf)
    j = torch.arange(wide.shape[-1], device=x.device)
    left = (~nm_hidden(wide, nm, p, j) & (wide > -math.inf))[..., :n_k]
    groups = wide.view(*x.shape[:2], -1, nm.m)
    ranked = groups.sort(dim=-1, descending=True).values
    gap = ranked[..., nm.n - 1] - ranked[..., nm.n]  # NaN where both are hidden
    bound = 2 * pad(error, (0, -n_k % nm.m)).view(groups.shape).amax(-1)
    close = gap <= bound
    if setup.ties:  # equal scores are equal everywhere, and the lower index wins
        close &= gap > 0
    return left, close.any(-1).T


def attend(setup: Setup, sheets: list[Sheet]) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse (base 2) of the call in its own dtype, differentiable.

    Products and softmax in float32 (float64), weights and results rounded to the dtype of v.
    """
    wide = torch.float64 if setup.q.dtype == torch.float64 else torch.float32
    heads, group = setup.q.shape[1], setup.q.shape[1] // setup.k.shape[1]
    out = setup.q.new_zeros(setup.q.shape[0], heads, setup.v.shape[-1])
    lse = torch.full(setup.q.shape[:2], -math.inf, dtype=wide, device=setup.q.device)
    sinks = setup.options.get("sinks")
    for sheet in sheets:
        exact = sheet.skip is not None and sheet.skip.exact_normalizer
        counted = sheet.left if exact else sheet.used
        if 0 in counted.shape:
            continue
        s = scores(setup, sheet.index, sheet.rows, sheet.keys)
        s = s.masked_fill(~counted, -math.inf)
        if sinks is not None:
            s = torch.cat([s, sinks.to(wide)[:, None, None].expand(-1, s.shape[1], 1)], -1)
        empty = ~counted.any(-1, keepdim=True)
        s = s.masked_fill(empty, 0.0)
        weights = torch.softmax(s, -1)[..., : counted.shape[-1]]
        weights = weights.masked_fill(empty | ~sheet.used, 0.0).to(setup.v.dtype).to(wide)
        v = setup.v[sheet.keys].to(wide).transpose(0, 1).repeat_interleave(group, 0)
        out[sheet.rows] = (weights @ v).transpose(0, 1).to(out.dtype)
        total = torch.logsumexp(s, -1) * LOG2E
        lse[sheet.rows] = total.masked_fill(empty.squeeze(-1), -math.inf).T
    return out, lse


def dropped(setup: Setup, sheets: list[Sheet]) -> tuple[torch.Tensor, torch.Tensor]:
    """The mass in skipped tiles and its bound from the tiles' maxima, float64 [Tq, Hq]."""
    shape, device = setup.q.shape[:2], setup.q.device
    lost, bound = torch.zeros(2, *shape, dtype=torch.float64, device=device)
    sinks = setup.options.get("sinks")
    for sheet in sheets:
        if sheet.skip is None or 0 in sheet.x.shape:
            continue
        left = sheet.x.masked_fill(~sheet.left, -math.inf)
        sink = left.new_full((left.shape[0], 1), -math.inf)
        if sinks is not None:
            sink = sinks.double()[:, None] * LOG2E
        pivot = torch.maximum(left.amax(-1), sink)  # [Hq, n_q]
        empty = left.amax(-1) == -math.inf
        pivot = pivot.masked_fill(empty, 0.0)
        weight = torch.exp2(left - pivot[..., None])
        kept = (weight * sheet.used).sum(-1) + torch.exp2(sink - pivot)
        gone = (weight * ~sheet.used).sum(-1)
        size = sheet.skip.block_keys
        tiles = pad((weight * ~sheet.used), (0, -weight.shape[-1] % size))
        worst = tiles.view(*pivot.shape, -1, size).amax(-1).sum(-1) * size
        lost[sheet.rows] = (gone / (kept + gone)).masked_fill(empty, 0.0).T
        bound[sheet.rows] = (worst / (kept + worst)).masked_fill(empty, 0.0).T
    return lost, bound

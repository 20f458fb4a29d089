"""What the kernels must compute, written out slowly in float64 numpy, one tile after another.

It knows the packing and plan dataclasses and nothing else of the package. `oracle` takes the
arguments of `attention_varlen`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from modelopt_sparse.kernels.types import DENSE, Phase, Plan

LOG2E = math.log2(math.e)
INF = math.inf


@dataclass
class Counts:
    """Decision tiles of one phase: visible [Hq], skipped [1 + len(count_thresholds), Hq]."""

    visible: np.ndarray
    skipped: np.ndarray


@dataclass
class OracleOutput:
    """The results, and how near to a tie the nearest decision was.

    Args:
        left: for each sequence bool [Hq, n_q, n_k], the keys that visibility and N:M left.
        used: the same, less the skipped tiles.
        kept: for each sequence bool [Hq, row tiles, key tiles], or None where nothing is skipped.
            Row tiles count from the tile that holds the sequence's first row.
        bound: [Tq, Hq], what `AttentionOutput.dropped_mass_bound` says.
        margin: least distance of a skip decision from its threshold, in log2 units.
        ties: how many skip decisions were at their threshold exactly.
        nm_margin: least gap, not 0, between the last score that a group leaves and the next.
        nm_ties: how many of those gaps are 0.
    """

    out: np.ndarray
    lse: np.ndarray
    dropped: np.ndarray
    bound: np.ndarray
    prefill: Counts | None = None
    decode: Counts | None = None
    kept: list = field(default_factory=list)
    left: list = field(default_factory=list)
    used: list = field(default_factory=list)
    margin: float = INF
    ties: int = 0
    nm_margin: float = INF
    nm_ties: int = 0


def as_array(tensor) -> np.ndarray:
    """float64 for floats, the values as they are for integers and booleans."""
    tensor = tensor.detach().cpu()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def row_positions(n_q: int, n_k: int, causal: bool) -> np.ndarray:
    """Where each query row sits."""
    return np.arange(n_q) + (n_k - n_q if causal else 0)


def grid_values(grid, b: int, h: int, n_q: int, n_k: int) -> np.ndarray:
    """[n_q, n_k] values of a `ScoreGrid`."""
    values = as_array(grid.values)[b]
    row = 0 if grid.row_start is None else int(grid.row_start[b])
    key = 0 if grid.key_start is None else int(grid.key_start[b])
    return values[h if values.shape[0] > 1 else 0, row : row + n_q, key : key + n_k]


def visible_keys(positions, n_k, causal, window, bounds) -> np.ndarray:
    """[n_q, n_k], before masks and biases."""
    p, j = positions[:, None], np.arange(n_k)[None, :]
    if bounds is not None:
        return (j >= bounds[:, :1]) & (j < bounds[:, 1:])
    seen = np.ones((len(positions), n_k), dtype=bool)
    if causal:
        seen &= j <= p
    if window is not None:
        seen &= j > p - window
    return seen


def nm_left(x, seen, positions, nm) -> tuple[np.ndarray, np.ndarray]:
    """The keys that N:M leaves, and the gaps from the last that stays to the first that goes."""
    n_q, n_k = x.shape
    groups = -(-n_k // nm.m)
    padded = np.full((n_q, groups * nm.m), -INF)
    padded[:, :n_k] = np.where(seen, x, -INF)
    padded = padded.reshape(n_q, groups, nm.m)
    order = np.argsort(-padded, axis=-1, kind="stable")  # equal scores: lower index first
    top = np.zeros(padded.shape, dtype=bool)
    np.put_along_axis(top, order[..., : nm.n], True, axis=-1)
    left = top.reshape(n_q, groups * nm.m)[:, :n_k] & seen
    ranked = np.take_along_axis(padded, order, axis=-1)
    gaps = np.zeros(0)
    if nm.n < nm.m and padded.size:
        last, gone = ranked[..., nm.n - 1], ranked[..., nm.n]
        gaps = last[gone > -INF] - gone[gone > -INF]
    p, j = positions[:, None], np.arange(n_k)[None, :]
    regardless = (j < nm.num_sink_tokens) | ((p - j >= 0) & (p - j < nm.dense_window_size))
    return left | (seen & regardless), gaps


def log2_thresholds(threshold, b: int, sequences: int, heads: int) -> np.ndarray:
    """[Hq] log2 of lambda for sequence b; -inf never skips."""
    if threshold is None:
        return np.full(heads, -INF)
    if isinstance(threshold, (int, float)):
        values = np.full(heads, float(threshold))
    else:
        values = np.broadcast_to(as_array(threshold), (sequences, heads))[b]
        values = np.where(np.isnan(values), 0.0, np.clip(values, 0.0, 1.0))
    with np.errstate(divide="ignore"):
        return np.log2(values + 0.0)


def in_force(part) -> bool:
    """Does this plan part skip anything? None and 0 are dense."""
    if part is None or part.threshold is None:
        return False
    return not (isinstance(part.threshold, (int, float)) and part.threshold == 0)


class Tally:
    """Tests tiles for one vote after another and counts."""

    def __init__(self, heads: int, part):
        self.part = part
        self.visible = np.zeros(heads, dtype=np.int64)
        self.skipped = np.zeros((1 + len(part.count_thresholds), heads), dtype=np.int64)
        self.margin, self.ties = INF, 0

    def skip(self, heads, tile_max, running, log2_lambda) -> bool:
        """Is the tile skipped? The voters are the rows that see something in it."""
        self.visible[heads] += 1
        verdict = False
        levels = [log2_lambda] + [math.log2(t) if t else -INF for t in self.part.count_thresholds]
        for row, level in enumerate(levels):
            # running is -inf at a row's first tile: nothing is less than that, so the tile is kept
            limit = running + level
            skipped = bool(np.all(tile_max < limit))
            self.skipped[row, heads] += skipped
            if row == 0:
                verdict = skipped
            finite = np.isfinite(limit)
            if finite.all():
                decisive = np.argmax(tile_max - limit)
                slack = abs(float(tile_max[decisive] - limit[decisive]))
                self.ties += slack == 0
                # at lambda 1 a tile may meet its own maximum: a tie that rounding can't break
                if slack > 0 or np.broadcast_to(level, limit.shape)[decisive] != 0:
                    self.margin = min(self.margin, slack)
        return verdict


def max_over(x, where) -> np.ndarray:
    """Each row's largest score, -inf where it has none."""
    return np.max(np.where(where, x, -INF), axis=-1, initial=-INF)


def prefill_skips(x, left, positions, part, log2_lambda, head, tally) -> np.ndarray:
    """kept [row tiles, key tiles] of one head."""
    n_q, n_k = x.shape
    tile_of_row = positions // part.block_rows
    key_tiles = -(-n_k // part.block_keys)
    first_tile = tile_of_row[0] if n_q else 0
    row_tiles = int(tile_of_row[-1] - first_tile + 1) if n_q else 0
    kept = np.zeros((row_tiles, key_tiles), dtype=bool)
    for t in range(row_tiles):
        rows = np.flatnonzero(tile_of_row == first_tile + t)

        def tile(c, rows=rows):
            return np.ix_(rows, range(c * part.block_keys, min((c + 1) * part.block_keys, n_k)))

        seen = [c for c in range(key_tiles) if left[tile(c)].any()]
        order = seen[-1:] + seen[:-1][:1] + seen[1:-1][::-1]  # last, first, from the end downward
        running = np.full(len(rows), -INF)
        for c in order:
            here = left[tile(c)]
            tile_max = max_over(x[tile(c)], here)
            votes = here.any(axis=-1)
            if not tally.skip([head], tile_max[votes], running[votes], log2_lambda):
                kept[t, c] = True
                running = np.maximum(running, tile_max)
    return kept


def decode_skips(x, left, part, log2_lambda, heads, tally) -> np.ndarray:
    """kept [key tiles] of one voting group; x and left [heads, n_q, n_k], log2_lambda [heads]."""
    n_heads, n_q, n_k = x.shape
    lines = (n_heads * n_q, n_k)  # one line for each (head, row)
    x, left = x.reshape(lines), left.reshape(lines)
    levels = np.repeat(log2_lambda, n_q)
    key_tiles = -(-n_k // part.block_keys)
    here = [left[:, c * part.block_keys : (c + 1) * part.block_keys] for c in range(key_tiles)]
    maxima = [
        max_over(x[:, c * part.block_keys : (c + 1) * part.block_keys], here[c])
        for c in range(key_tiles)
    ]
    sees = [tile.any(axis=-1) for tile in here]
    seed = np.full(len(x), -INF)
    for row in range(len(x)):
        tiles = [c for c in range(key_tiles) if sees[c][row]]
        if tiles:
            seed[row] = max(maxima[tiles[0]][row], maxima[tiles[-1]][row])
    kept = np.zeros(key_tiles, dtype=bool)
    per_segment = part.segment_keys // part.block_keys
    for start in range(0, key_tiles, per_segment):
        running = seed.copy()
        for c in reversed(range(start, min(start + per_segment, key_tiles))):
            votes = sees[c]
            if not votes.any():
                continue
            if not tally.skip(heads, maxima[c][votes], running[votes], levels[votes]):
                kept[c] = True
                running = np.maximum(running, maxima[c])
    return kept


def expand(kept, positions, n_k, part, decode) -> np.ndarray:
    """kept tiles [Hq, row tiles, key tiles] as keys [Hq, n_q, n_k]."""
    keys = np.arange(n_k) // part.block_keys
    if decode:
        rows = np.zeros(len(positions), dtype=int)
    else:
        rows = positions // part.block_rows
        rows = rows - rows[0] if len(rows) else rows
    return np.asarray(kept)[:, rows][:, :, keys]


def weigh(x, used, left, v, sink, exact_normalizer, block_keys):
    """out, lse, dropped mass and its bound of one head's rows."""
    n_q, n_k, dv = *x.shape, v.shape[1]
    out, lse = np.zeros((n_q, dv)), np.full(n_q, -INF)
    dropped, bound = np.zeros(n_q), np.zeros(n_q)
    for i in range(n_q):
        if not left[i].any():
            continue
        pivot = max(np.max(x[i, left[i]]), sink)
        weight = np.where(left[i], np.exp2(np.where(left[i], x[i], -INF) - pivot), 0.0)
        everything = weight.sum() + np.exp2(sink - pivot)
        stays = weight[used[i]].sum() + np.exp2(sink - pivot)
        numerator = weight[used[i]] @ v[used[i]]
        dropped[i] = weight[left[i] & ~used[i]].sum() / everything
        most = 0.0
        for start in range(0, n_k, block_keys):
            tile = slice(start, start + block_keys)
            if left[i, tile].any() and not used[i, tile].any():
                most += block_keys * weight[tile].max()
        bound[i] = most / (stays + most)
        total = everything if exact_normalizer else stays
        out[i] = numerator / total
        lse[i] = pivot + np.log2(total)
    return out, lse, dropped, bound


def oracle(
    q, k, v, seqs, *, causal=True, scale=None, window=None, softcap=None, sinks=None, bounds=None,
    mask=None, bias=None, phase=None, plan: Plan = DENSE,
) -> OracleOutput:  # fmt: skip
    """The contract, for the arguments of `attention_varlen`."""
    q, k, v = as_array(q), as_array(k), as_array(v)
    heads, kv_heads = q.shape[1], k.shape[1]
    group = heads // kv_heads
    scale = q.shape[2] ** -0.5 if scale is None else scale
    sink = np.full(heads, -INF) if sinks is None else as_array(sinks) * LOG2E
    bounds = None if bounds is None else as_array(bounds)
    sequences = len(seqs.q_len)
    result = OracleOutput(
        np.zeros((q.shape[0], heads, v.shape[2])),
        np.full((q.shape[0], heads), -INF),
        np.zeros((q.shape[0], heads)),
        np.zeros((q.shape[0], heads)),
    )
    tallies = {}
    for name, part in ((Phase.PREFILL, plan.skip), (Phase.DECODE, plan.skip_decode)):
        if in_force(part):
            tallies[name] = Tally(heads, part)
    for b in range(sequences):
        q0, n_q = int(seqs.q_start[b]), int(seqs.q_len[b])
        k0, n_k = int(seqs.k_start[b]), int(seqs.k_len[b])
        this = phase or (Phase.DECODE if n_q == 1 else Phase.PREFILL)
        positions = row_positions(n_q, n_k, causal)
        x = np.zeros((heads, n_q, n_k))
        left = np.zeros((heads, n_q, n_k), dtype=bool)
        row_bounds = None if bounds is None else bounds[q0 : q0 + n_q]
        for h in range(heads):
            keys = k[k0 : k0 + n_k, h // group]
            score = (q[q0 : q0 + n_q, h] @ keys.T) * (scale * LOG2E)
            if softcap is not None:
                score = softcap * LOG2E * np.tanh(score / (softcap * LOG2E))
            seen = visible_keys(positions, n_k, causal, window, row_bounds)
            if bias is not None:
                added = grid_values(bias, b, h, n_q, n_k)
                score = score + added * LOG2E
                seen = seen & (added != -INF)
            if mask is not None:
                seen = seen & grid_values(mask, b, h, n_q, n_k)
            x[h] = np.where(seen, score, -INF)
            left[h] = seen
            if plan.nm is not None and this is Phase.PREFILL:
                left[h], gaps = nm_left(x[h], seen, positions, plan.nm)
                result.nm_ties += int((gaps == 0).sum())
                result.nm_margin = min(result.nm_margin, gaps[gaps > 0].min(initial=INF))
        used, kept, tally = left, None, tallies.get(this)
        if tally is not None:
            part = tally.part
            levels = log2_thresholds(part.threshold, b, sequences, heads)
            if this is Phase.PREFILL:
                kept = np.stack(
                    [
                        prefill_skips(x[h], left[h], positions, part, levels[h], h, tally)
                        for h in range(heads)
                    ]
                )
            else:
                size = part.vote_heads or group
                kept = np.zeros((heads, min(1, n_q), -(-n_k // part.block_keys)), dtype=bool)
                for h in range(0, heads, size):
                    who = list(range(h, h + size))
                    kept[who] = decode_skips(x[who], left[who], part, levels[who], who, tally)
            used = left & expand(kept, positions, n_k, part, this is Phase.DECODE)
        exact = tally is not None and tally.part.exact_normalizer
        for h in range(heads):
            values = v[k0 : k0 + n_k, h // group]
            rows = slice(q0, q0 + n_q)
            block_keys = max(n_k, 1) if tally is None else tally.part.block_keys
            found = weigh(x[h], used[h], left[h], values, sink[h], exact, block_keys)
            (
                result.out[rows, h],
                result.lse[rows, h],
                result.dropped[rows, h],
                result.bound[rows, h],
            ) = found
        result.kept.append(kept)
        result.left.append(left)
        result.used.append(used)
    for name, tally in tallies.items():
        result.margin = min(result.margin, tally.margin)
        result.ties += tally.ties
        setattr(result, name.value, Counts(tally.visible, tally.skipped))
    return result

"""From a case to the arguments of a call, on a device."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch

from modelopt_sparse.kernels.types import (
    NMSparsity,
    Phase,
    Plan,
    ScoreGrid,
    Seqs,
    SkipSoftmax,
    SkipSoftmaxDecode,
    TileMap,
)
from tests.gpu.cases import SHAPES, Case
from tests.gpu.tiles import spans, tile_map, tile_shape
from tests.inputs import EXACT_SCALE, Inputs, integers, lay_out, topical

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
COUNTED = (0.5, 0.015625)
WINDOWS = (1, 17, 70, 300)


@dataclass
class Setup:
    """A call.

    Args:
        exact: scores carry no rounding. grained: the dot products of q and k don't.
        ties: scores that are equal in float64 are equal however they are computed.
        given: the tiles of ``plan.tiles``, for each sequence bool [Hq, row tiles, key tiles] or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    seqs: Seqs
    plan: Plan
    options: dict
    exact: bool = False
    grained: bool = False
    ties: bool = False
    given: list | None = None

    @property
    def qkv(self):
        return self.q, self.k, self.v, self.seqs

    @property
    def scale(self) -> float:
        scale = self.options.get("scale")
        return self.q.shape[-1] ** -0.5 if scale is None else scale

    @property
    def causal(self) -> bool:
        return self.options.get("causal", True)

    def decodes(self, n_q: int) -> bool:
        """Whether a sequence of so many rows decodes."""
        return Phase.of(n_q, self.options.get("phase")) is Phase.DECODE

    def widened(self) -> Setup:
        """The same call in float64."""
        options = dict(self.options)
        if "sinks" in options:
            options["sinks"] = options["sinks"].double()
        if "bias" in options:
            grid = options["bias"]
            options["bias"] = replace(grid, values=grid.values.double())
        return replace(
            self, q=self.q.double(), k=self.k.double(), v=self.v.double(), options=options
        )


def on(device: torch.device | str, seqs: Seqs) -> Seqs:
    """The sequences with their tensors on a device."""
    columns = (seqs.q_start, seqs.q_len, seqs.k_start, seqs.k_len)
    bounds = seqs.max_q, seqs.max_k, seqs.min_q
    return Seqs(*(column.to(device) for column in columns), *bounds)


def laid(x: torch.Tensor, strides: str) -> torch.Tensor:
    """The values of x [tokens, heads, dim] in other memory; what lies between is NaN."""
    tokens, heads, dim = x.shape
    if strides == "heads_first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if strides == "padded":
        wide = x.new_full((tokens, heads, dim + 8), math.nan)
        wide[..., :dim] = x
        return wide[..., :dim]
    if strides == "odd":  # nothing is aligned
        token = heads * (dim + 1) + 2
        flat = x.new_full((1 + tokens * token,), math.nan)
        view = flat.as_strided((tokens, heads, dim), (token, dim + 1, 1), 1)
        view.copy_(x)
        return view
    return x.contiguous()


def overlapping(x: torch.Tensor, seqs: Seqs) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys in a cache [B, Hk, length, dim], seen as [tokens, Hk, dim] without a copy.

    Returns:
        The view, whose heads overlap, and the start of each sequence in it.
    """
    batch, heads, dim = len(seqs.k_len), x.shape[1], x.shape[2]
    length = seqs.max_k + 3
    cache = x.new_full((batch, heads, length, dim), math.nan)
    for b, (_, _, start, n_k) in enumerate(spans(seqs)):
        cache[b, :, :n_k] = x[start : start + n_k].transpose(0, 1)
    tokens = (batch - 1) * heads * length + length
    view = cache.as_strided((tokens, heads, dim), (dim, length * dim, 1))
    starts = torch.arange(batch, dtype=torch.int32, device=x.device) * (heads * length)
    return view, starts


def make_inputs(case: Case, seed: int) -> Inputs:
    """Packed tensors on the CPU."""
    q_lens, k_lens = SHAPES[case.shape]
    (heads, kv_heads), (dim, dim_v) = case.heads, case.dims
    common = {"heads": heads, "kv_heads": kv_heads, "dim_v": dim_v, "gaps": case.gaps}
    common |= {"dtype": DTYPES[case.dtype], "seed": seed}
    # Enough topics that rows which vote together leave some out.
    span, topics = (case.blocks[1], 6) if case.skip_decode == "none" else (case.segments[0], 12)
    if case.inputs == "topical":
        made = topical(q_lens, k_lens, dim=dim, span=span, strength=9.0, topics=topics, **common)
        if case.skip_decode != "none":
            agreeing(made.q, heads // kv_heads)
        return made
    if case.inputs == "integers":
        return spread(integers(q_lens, k_lens, dim=8, span=span, **common), dim)
    seqs, rows, keys = lay_out(q_lens, k_lens, case.gaps)
    rng = np.random.default_rng(seed)
    tensors = []
    for tokens, count, width in (
        (rows, heads, dim),
        (keys, kv_heads, dim),
        (keys, kv_heads, dim_v),
    ):
        x = torch.from_numpy(rng.standard_normal((tokens, count, width), dtype=np.float32))
        tensors.append(x.to(common["dtype"]))
    owned = (covered(seqs.q_start, seqs.q_len, rows), covered(seqs.k_start, seqs.k_len, keys))
    for x, owns in zip(tensors, (owned[0], owned[1], owned[1]), strict=True):
        x[~owns] = math.nan
    return Inputs(*tensors, seqs)


def agreeing(q: torch.Tensor, group: int) -> None:
    """Gives the heads of a group the first one's topics, each with a small change of its own."""
    for head in range(q.shape[1]):
        first = q[:, head - head % group]
        q[:, head] = first + (head % group) / 8 * (first > 0)


def covered(start: torch.Tensor, length: torch.Tensor, total: int) -> torch.Tensor:
    """Which of `total` places some sequence owns."""
    owns = torch.zeros(total, dtype=torch.bool)
    for first, n in zip(start.tolist(), length.tolist(), strict=True):
        owns[first : first + n] = True
    return owns


def spread(inputs: Inputs, dim: int) -> Inputs:
    """Integer vectors over `dim` channels, the last included; the added channels cancel out."""
    q, k = inputs.q, inputs.k
    at = torch.linspace(0, dim - 1, q.shape[-1]).long()
    rng = np.random.default_rng(dim)
    wide = []
    for x, keep in ((q, 0), (k, 1)):
        added = torch.from_numpy(rng.integers(-1, 2, (*x.shape[:2], dim))).to(x.dtype)
        added[..., keep::2] = 0
        added[..., at] = x
        added[x[..., 0].isnan()] = math.nan
        wide.append(added)
    return Inputs(*wide, inputs.v, inputs.seqs, exact=True)


def build(case: Case, device: torch.device | str) -> Setup:
    """The arguments of a case."""
    seed = zlib.crc32(case.name.encode())
    rng = np.random.default_rng(seed)
    inputs = make_inputs(case, seed)
    seqs = on(device, inputs.seqs)
    q, k, v = (laid(x.to(device), case.strides) for x in (inputs.q, inputs.k, inputs.v))
    if case.strides == "overlap":
        k, starts = overlapping(k, seqs)
        v, _ = overlapping(v, seqs)
        seqs = replace(seqs, k_start=starts)
    factor = {"default": 1.0, "half": 0.5, "negative": -1.0}[case.scale]
    exact = inputs.exact and case.softcap is None
    options: dict = {}
    if inputs.exact:
        options["scale"] = EXACT_SCALE * factor
    elif factor != 1:
        options["scale"] = case.dims[0] ** -0.5 * factor
    if case.sight in ("full", "full_bounds"):
        options["causal"] = False
    if case.sight == "window":
        options["window"] = int(rng.choice(WINDOWS))
    if case.sight in ("bounds", "full_bounds"):
        options["bounds"] = intervals(rng, seqs, q.shape[0]).to(device)
    width = case.heads[0] if case.wide_grid else 1
    if case.mask:
        options["mask"] = grid(rng, seqs, holes(rng, seqs, width), False)
    if case.bias:
        options["bias"] = additive(rng, seqs, width, inputs)
    if case.softcap is not None:
        options["softcap"] = case.softcap
    if case.sinks:
        kind = torch.float32 if rng.random() < 0.5 else q.dtype
        options["sinks"] = torch.from_numpy(rng.standard_normal(case.heads[0])).to(device, kind)
    phase = {"one_row": Phase.PREFILL, "draft": Phase.DECODE}.get(case.shape)
    if phase is not None:
        options["phase"] = phase
    plan, given = make_plan(case, rng, seqs, inputs.exact), None
    if case.skip == "given":
        given, tiles = some_tiles(case, rng, seqs, q.shape[0], options)
        plan = replace(plan, tiles=tiles)
    grained = case.inputs != "normal"
    ties = inputs.exact or (grained and not case.bias)
    return Setup(q, k, v, seqs, plan, options, exact, grained, ties, given)


def intervals(rng, seqs: Seqs, rows: int) -> torch.Tensor:
    """Bounds that show most keys, few, or none, some of them beyond the sequence; noise in unowned rows."""
    bounds = rng.integers(-(2**30), 2**30, (rows, 2), dtype=np.int32)
    for q_start, n_q, _, n_k in spans(seqs):
        edges = np.sort(rng.integers(-n_k // 4 - 1, n_k + n_k // 4 + 2, (n_q, 2)), axis=1)
        edges[rng.random(n_q) < 0.05] = (3, 3)
        bounds[q_start : q_start + n_q] = edges
    return torch.from_numpy(bounds)


def grid(rng, seqs: Seqs, values: torch.Tensor, outside: float | bool) -> ScoreGrid:
    """`values` [B, width, max_q, max_k] at offsets of its own for each sequence, `outside` around them."""
    batch, width, rows, keys = values.shape
    row_start, key_start = rng.integers(0, 4, (2, batch)).tolist()
    wide = values.new_full((batch, width, rows + 4, keys + 5), outside)
    for b, (_, n_q, _, n_k) in enumerate(spans(seqs)):
        r, c = row_start[b], key_start[b]
        wide[b, :, r : r + n_q, c : c + n_k] = values[b, :, :n_q, :n_k]
    device = seqs.q_len.device
    starts = (torch.tensor(x, dtype=torch.int32, device=device) for x in (row_start, key_start))
    return ScoreGrid(wide.to(device), *starts)


def holes(rng, seqs: Seqs, width: int) -> torch.Tensor:
    """A mask with single holes, and with holes of 16 by 16 so that whole tiles are hidden."""
    shape = (len(seqs.q_len), width, seqs.max_q, seqs.max_k)
    coarse = rng.random((*shape[:2], -(-shape[2] // 16), -(-shape[3] // 16))) < 0.7
    coarse = coarse.repeat(16, 2).repeat(16, 3)[:, :, : shape[2], : shape[3]]
    return torch.from_numpy((rng.random(shape, dtype=np.float32) < 0.8) & coarse)


def additive(rng, seqs: Seqs, width: int, inputs: Inputs) -> ScoreGrid:
    """A bias with -inf here and there; nothing else with integers, whose scores stay integers."""
    shape = (len(seqs.q_len), width, seqs.max_q, seqs.max_k)
    values = np.zeros(shape, dtype=np.float32)
    if not inputs.exact:
        values = rng.standard_normal(shape, dtype=np.float32)
    values[rng.random(shape, dtype=np.float32) < 0.15] = -math.inf
    kind = torch.float32 if rng.random() < 0.5 else inputs.q.dtype
    return grid(rng, seqs, torch.from_numpy(values).to(kind), math.nan)


def make_plan(case: Case, rng, seqs: Seqs, exact: bool) -> Plan:
    """The plan, with thresholds at which some tiles go and some stay."""
    threshold = thresholds(case, rng, seqs, exact)
    all_counted = (*COUNTED, 1.0 if exact else 0.95)
    nm = None if case.nm is None else NMSparsity(*case.nm, *case.shield)
    skip = decode = None
    if case.skip not in ("none", "given"):
        counted = all_counted if case.skip in ("counts", "count_only") else ()
        in_force = None if case.skip == "count_only" else threshold
        skip = SkipSoftmax(
            in_force, *case.blocks, counted, case.skip == "exact", histogram=bool(counted)
        )
    if case.skip_decode != "none":
        counted = all_counted if case.skip_decode == "counts" else ()
        per_head, normalised = case.skip_decode == "per_head", case.skip_decode == "exact"
        vote_heads = 1 if per_head else None
        decode = SkipSoftmaxDecode(
            threshold, *case.segments, vote_heads, counted, normalised, histogram=bool(counted)
        )
    return Plan(nm=nm, skip=skip, skip_decode=decode)


def thresholds(case: Case, rng, seqs: Seqs, exact: bool) -> float | torch.Tensor:
    """A lambda in the case's form. With integer scores a power of two, so that ties are ties."""
    batch, heads, device = len(seqs.q_len), case.heads[0], seqs.q_len.device
    levels = [0.25, 0.5, 2.0**-5, 1.0] if exact else [0.1, 0.4, 0.02, 0.9]
    if case.threshold == "number":
        return float(rng.choice(levels[:2]))
    sizes = {"heads": (heads,), "sequences": (batch, 1), "both": (batch, heads)}[case.threshold]
    values = rng.choice(levels, sizes)
    if case.threshold == "both":  # all of them keep every tile
        values.flat[:: max(values.size // 3, 2)] = rng.choice([0.0, -1.0, math.nan])
    return torch.from_numpy(values).float().to(device)


def some_tiles(case: Case, rng, seqs: Seqs, rows: int, options: dict) -> tuple[list, TileMap]:
    """Half of all tiles, visible or not; some rows are left with none."""
    causal, phase = options.get("causal", True), options.get("phase")
    kept: list = []
    for _, n_q, _, n_k in spans(seqs):
        shape = (case.heads[0], *tile_shape(n_q, n_k, causal, *case.blocks))
        decodes = Phase.of(n_q, phase) is Phase.DECODE
        kept.append(None if decodes else torch.from_numpy(rng.random(shape) < 0.5))
    return kept, tile_map(kept, seqs, rows, case.heads[0], case.blocks, causal, phase)

"""Every rule on the arguments of a kernel call, once. Nothing here waits for a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from modelopt_sparse.errors import ArgumentError, ArgumentTypeError, UnsupportedCall, describe

from .check_values import check_bool, check_int, check_number, check_tensor, is_readable
from .pages import check_entries
from .scale_factors import ScaleFactors
from .thresholds import check_factor, check_fraction, check_threshold
from .tiles import slot_count, word_count
from .types import (
    NMSparsity,
    Phase,
    Plan,
    ScoreGrid,
    Seqs,
    SkipSoftmax,
    SkipSoftmaxDecode,
    TileMap,
)

S = TypeVar("S", SkipSoftmax, SkipSoftmaxDecode)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FP8 = torch.float8_e4m3fn
TILE_SIZES = (16, 32, 64, 128)


class Call(NamedTuple):
    """The arguments of `attention_varlen`. `checked` fills in the scale and resolves the plan."""

    q: Tensor
    k: Tensor
    v: Tensor
    seqs: Seqs
    plan: Plan  # without a default, for torch.compile can't trace one that is an object
    causal: bool = True
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    bounds: Tensor | None = None
    mask: ScoreGrid | None = None
    bias: ScoreGrid | None = None
    phase: Phase | None = None
    details: bool = False
    block_tables: tuple[Tensor, Tensor] | None = None  # of k and v, whose first dims are pages then
    v_scale: float = 1.0  # of values in 8 bits; that of keys is in the scale


def checked(call: Call) -> Call:
    """The call, if every argument is one that `attention_varlen` takes; else the error that says why.

    In what comes back the scale is a float, and each part of the plan leaves something out.
    """
    q, seqs = call.q, call.seqs
    check_qkv(q, call.k, call.v, is_paged=call.block_tables is not None)
    _check_seqs(seqs, q)
    if call.block_tables is not None:
        _check_block_tables(call.block_tables, call)
    elif is_readable(q):
        _check_extent("k", seqs.k_start, seqs.k_len, call.k.shape[0], seqs.max_k)
    check_bool("causal", call.causal)
    check_bool("details", call.details)
    scale = q.shape[-1] ** -0.5 if call.scale is None else check_number("scale", call.scale)
    if call.softcap is not None and check_number("softcap", call.softcap) <= 0:
        raise ArgumentError(describe("softcap", call.softcap, "a number above 0, or None"))
    if call.window is not None:
        _check_window(call)
    if call.sinks is not None:
        check_tensor("sinks", call.sinks, q.device, shape=(q.shape[1],), floating=True)
    if call.bounds is not None:
        check_tensor("bounds", call.bounds, q.device, shape=(q.shape[0], 2), dtype=torch.int32)
    for name, grid in (("mask", call.mask), ("bias", call.bias)):
        if grid is not None:
            _check_grid(name, grid, q, seqs)
    if call.mask is not None and call.mask.values.dtype != torch.bool:
        raise ArgumentError(describe("mask", str(call.mask.values.dtype), "torch.bool"))
    if call.bias is not None and not call.bias.values.is_floating_point():
        raise ArgumentError(describe("bias", str(call.bias.values.dtype), "a floating dtype"))
    if call.phase is not None and not isinstance(call.phase, Phase):
        takes = "Phase.PREFILL, Phase.DECODE or None"
        raise ArgumentTypeError(describe("phase", repr(call.phase), takes))
    plan = _resolved_plan(call)
    if plan.tiles is not None:
        _check_tiles(plan.tiles, plan, call)
    return call._replace(scale=scale, plan=plan)


def _check_window(call: Call) -> None:
    check_int("window", call.window, least=1)
    if not call.causal:
        remedy = "Give a bidirectional window as bounds."
        raise UnsupportedCall(describe("window", "causal=False", "causal=True", remedy))
    if call.bounds is not None:
        raise ArgumentError(describe("window", "bounds as well", "one of window and bounds"))


def _resolved_plan(call: Call) -> Plan:
    """The plan with each part checked, and None in place of a part that would leave nothing out."""
    plan = call.plan
    if not isinstance(plan, Plan):
        raise ArgumentTypeError(describe("plan", repr(plan), "a Plan"))
    nm = _resolved_nm(plan.nm)
    skip = _resolved_skip("plan.skip", plan.skip, SkipSoftmax, call)
    decode = _resolved_skip("plan.skip_decode", plan.skip_decode, SkipSoftmaxDecode, call)
    if nm is plan.nm and skip is plan.skip and decode is plan.skip_decode:
        return plan
    return Plan(nm, skip, decode, plan.tiles)


def _resolved_nm(nm: NMSparsity | None) -> NMSparsity | None:
    if nm is None:
        return None
    if not isinstance(nm, NMSparsity):
        raise ArgumentTypeError(describe("plan.nm", repr(nm), "an NMSparsity or None"))
    check_int("m", nm.m)
    if nm.m not in (4, 8):
        raise ArgumentError(describe("m", nm.m, "4 or 8"))
    check_int("n", nm.n, least=1, most=nm.m)
    check_int("num_sink_tokens", nm.num_sink_tokens, least=0)
    check_int("dense_window_size", nm.dense_window_size, least=0)
    return None if nm.n == nm.m else nm


def _resolved_skip(name: str, skip: S | None, kind: type[S], call: Call) -> S | None:
    if skip is None:
        return None
    if not isinstance(skip, kind):
        raise ArgumentTypeError(describe(name, repr(skip), f"a {kind.__name__} or None"))
    if isinstance(skip, SkipSoftmax):
        _check_tile_size("block_rows", skip.block_rows)
    _check_tile_size("block_keys", skip.block_keys)
    check_bool("exact_normalizer", skip.exact_normalizer)
    check_bool("histogram", skip.histogram)
    if isinstance(skip, SkipSoftmaxDecode):
        check_int("segment_keys", skip.segment_keys, least=1)
        if skip.segment_keys % skip.block_keys:
            takes = f"a multiple of block_keys ({skip.block_keys})"
            raise ArgumentError(describe("segment_keys", skip.segment_keys, takes))
        if skip.vote_heads is not None:
            _check_vote_heads(skip.vote_heads, call)
    if not isinstance(skip.count_thresholds, tuple):
        raise ArgumentTypeError(
            describe("count_thresholds", repr(skip.count_thresholds), "a tuple of fractions")
        )
    counted: tuple[float, ...] = ()
    if skip.count_thresholds:
        counted = tuple(check_fraction("count_thresholds", x) for x in skip.count_thresholds)
    threshold = _resolved_threshold(skip.threshold, call)
    if skip.scale_factor is not None:
        if skip.threshold is not None:
            takes = "one of threshold and scale_factor"
            raise ArgumentError(describe("scale_factor", "a threshold as well", takes))
        threshold = _own_threshold(skip.scale_factor, call)
    least = check_int("min_context", skip.min_context, least=0)
    is_counted = bool(counted) or skip.histogram
    if (threshold is None and not is_counted) or call.seqs.max_k < least:
        return None
    if threshold is not None and least:
        # A product, for a number that makes a tensor would be a constant of a compiled graph.
        threshold = (call.seqs.k_len[:, None] >= least).double() * threshold
    if threshold is skip.threshold and not counted:
        return skip
    return replace(
        skip, threshold=threshold, count_thresholds=counted, min_context=0, scale_factor=None
    )


def _check_vote_heads(heads: Any, call: Call) -> None:
    group = call.q.shape[1] // call.k.shape[-2]
    if group % check_int("vote_heads", heads, least=1):
        takes = f"a divisor of the {group} query heads of a KV head, or None"
        raise ArgumentError(describe("vote_heads", heads, takes))


def _resolved_threshold(value: Any, call: Call) -> float | Tensor | None:
    """A lambda, or None where it means dense. The values of a tensor stay unread."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return check_fraction("threshold", value) or None
    batch, heads = call.seqs.q_len.shape[0], call.q.shape[1]
    check_threshold("threshold", value, batch, heads, call.q.device)
    return value


def _own_threshold(factor: Any, call: Call) -> Tensor | None:
    """Each sequence's lambda by its own number of keys: fp64 [B, 1 or Hq]; None where the factor is 0."""
    if isinstance(factor, ScaleFactors):
        if factor.heads not in (1, call.q.shape[1]):
            takes = f"one, or one for each of the {call.q.shape[1]} query heads"
            raise ArgumentError(
                describe("scale_factor", f"factors for {factor.heads} heads", takes)
            )
        return factor.thresholds(call.seqs.k_len)
    factor = check_factor("scale_factor", factor)
    if not factor:
        return None
    thresholds: Tensor = factor / call.seqs.k_len[:, None].double()
    return thresholds.clamp(max=1.0)


def _check_tile_size(name: str, value: Any) -> None:
    if check_int(name, value) not in TILE_SIZES:
        raise ArgumentError(describe(name, value, f"one of {TILE_SIZES}"))


def _check_tiles(tiles: TileMap, plan: Plan, call: Call) -> None:
    """Given tiles are laid out as this call lays them out. That the lengths are equal stays unread."""
    if not isinstance(tiles, TileMap):
        raise ArgumentTypeError(describe("plan.tiles", repr(tiles), "a TileMap or None"))
    if plan.skip is not None:
        remedy = "Given tiles are not decided upon."
        raise ArgumentError(
            describe("plan.tiles", "plan.skip as well", "one of plan.tiles and plan.skip", remedy)
        )
    if tiles.block_rows is None:
        raise ArgumentError(
            describe("plan.tiles", "a map of sequences that decode", "one of sequences in prefill")
        )
    _check_tile_size("plan.tiles.block_rows", tiles.block_rows)
    _check_tile_size("plan.tiles.block_keys", tiles.block_keys)
    for name in ("causal", "phase"):
        got, takes = getattr(tiles, name), getattr(call, name)
        if got is not takes:
            raise ArgumentError(describe(f"plan.tiles.{name}", got, f"{takes}, as the call"))
    if not isinstance(tiles.seqs, Seqs):
        raise ArgumentTypeError(describe("plan.tiles.seqs", repr(tiles.seqs), "a Seqs"))
    batch, heads = call.seqs.q_len.shape[0], call.q.shape[1]
    shape = (batch,)
    for name in ("q_len", "k_len"):
        value = getattr(tiles.seqs, name)
        check_tensor(f"plan.tiles.seqs.{name}", value, call.q.device, shape, torch.int32)
    slots = slot_count(call.q.shape[0], batch, call.seqs.max_q, tiles.block_rows)
    words = word_count(call.seqs.max_k, tiles.block_keys)
    check_tensor("plan.tiles.words", tiles.words, call.q.device, (slots, heads, words), torch.int32)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, is_paged: bool = False) -> None:
    """The three tensors of a call fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise ArgumentTypeError(describe(name, type(x).__name__, "a tensor"))
    dtype, device = q.dtype, q.device
    for name, x in (("q", q), ("k", k), ("v", v)):
        in_pages = is_paged and name != "q"
        if x.ndim != 3 + in_pages or (not x.numel() and 0 in x.shape[1:]):
            axes = f"[{'pages, page_size' if in_pages else 'tokens'}, heads, head_dim]"
            raise ArgumentError(describe(name, f"shape {tuple(x.shape)}", axes))
        is_quantized = in_pages and x.dtype == FP8
        if x.dtype not in DTYPES and not is_quantized:
            raise ArgumentError(describe(name, str(x.dtype), ", ".join(map(str, DTYPES))))
        if (x.dtype != dtype and not is_quantized) or x.device != device:
            got, takes = f"{x.dtype} on {x.device}", f"{dtype} on {device}, as q"
            raise ArgumentError(describe(name, got, takes))
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ArgumentError(
                describe(
                    name, f"strides {x.stride()}", "a contiguous last dim", "Call .contiguous()."
                )
            )
    if k.shape[-1] != q.shape[-1]:
        raise ArgumentError(describe("k", f"head_dim {k.shape[-1]}", f"{q.shape[-1]}, as q"))
    if q.shape[1] % k.shape[-2]:
        takes = f"a divisor of the {q.shape[1]} query heads"
        raise ArgumentError(describe("k", f"{k.shape[-2]} heads", takes))
    if v.dtype != k.dtype:
        raise ArgumentError(describe("v", str(v.dtype), f"{k.dtype}, as k"))
    # Pages of k and of v may be in caches of different sizes.
    first = int(is_paged)
    if v.shape[first:-1] != k.shape[first:-1]:
        takes = f"[{', '.join(map(str, ['pages'] * is_paged + list(k.shape[first:-1])))}, Dv]"
        raise ArgumentError(describe("v", f"shape {tuple(v.shape)}", takes))


def _check_seqs(seqs: Seqs, q: Tensor) -> None:
    if not isinstance(seqs, Seqs):
        raise ArgumentTypeError(describe("seqs", repr(seqs), "a Seqs"))
    check_int("seqs.max_q", seqs.max_q, least=0)
    check_int("seqs.max_k", seqs.max_k, least=0)
    check_int("seqs.min_q", seqs.min_q, least=0)
    batch = seqs.q_len.shape[0] if isinstance(seqs.q_len, Tensor) and seqs.q_len.ndim == 1 else -1
    device, shape = q.device, (batch,)
    check_tensor("seqs.q_start", seqs.q_start, device, shape, torch.int32)
    check_tensor("seqs.q_len", seqs.q_len, device, shape, torch.int32)
    check_tensor("seqs.k_start", seqs.k_start, device, shape, torch.int32)
    check_tensor("seqs.k_len", seqs.k_len, device, shape, torch.int32)
    if is_readable(q):
        _check_extent("q", seqs.q_start, seqs.q_len, q.shape[0], seqs.max_q)
        short = seqs.q_len[(seqs.q_len > 0) & (seqs.q_len < seqs.min_q)]
        if short.numel():
            takes = f"0, or at least seqs.min_q = {seqs.min_q}"
            raise ArgumentError(describe("seqs.q_len", int(short[0]), takes))


def _check_block_tables(tables: tuple[Tensor, Tensor], call: Call) -> None:
    seqs = call.seqs
    batch = seqs.q_len.shape[0]
    for name, table in zip(("block_table", "v_block_table"), tables, strict=True):
        check_tensor(name, table, call.q.device, shape=(batch, -1), dtype=torch.int32)
        if table.stride(-1) != 1 and table.shape[-1] > 1:
            raise ArgumentError(
                describe(name, f"strides {table.stride()}", "a contiguous last dim")
            )
        holds = table.shape[1] * call.k.shape[1]
        if seqs.max_k > holds:
            takes = f"at most {holds}, what the {table.shape[1]} columns of {name} hold"
            raise ArgumentError(describe("seqs.max_k", seqs.max_k, takes))
    if is_readable(call.q):
        check_entries(call.k, call.v, tables, seqs)


def _check_extent(letter: str, start: Tensor, length: Tensor, total: int, most: int) -> None:
    for name, values, least, limit, takes in (
        ("start", start, 0, total, f"offsets in [0, {total}]"),
        ("len", length, 0, most, f"lengths in [0, seqs.max_{letter} = {most}]"),
        (
            "start + len",
            start.long() + length.long(),
            0,
            total,
            f"at most {total}, the size of {letter}",
        ),
    ):
        bad = values[(values < least) | (values > limit)]
        if bad.numel():
            raise ArgumentError(describe(f"seqs.{letter}_{name}", int(bad[0]), takes))


def _check_grid(name: str, grid: ScoreGrid, q: Tensor, seqs: Seqs) -> None:
    if not isinstance(grid, ScoreGrid):
        raise ArgumentTypeError(describe(name, repr(grid), "a ScoreGrid"))
    batch, heads = seqs.q_len.shape[0], q.shape[1]
    values = grid.values
    if not isinstance(values, Tensor):
        raise ArgumentTypeError(describe(f"{name}.values", repr(values), "a tensor"))
    if values.ndim != 4 or values.shape[0] != batch or values.shape[1] not in (1, heads):
        takes = f"[{batch}, 1 or {heads}, rows, keys]"
        raise ArgumentError(describe(f"{name}.values", f"shape {tuple(values.shape)}", takes))
    if values.device != q.device:
        raise ArgumentError(describe(f"{name}.values", str(values.device), f"{q.device}, as q"))
    for axis, size, length in (("row", 2, seqs.q_len), ("key", 3, seqs.k_len)):
        start = getattr(grid, f"{axis}_start")
        if start is not None:
            check_tensor(f"{name}.{axis}_start", start, q.device, shape=(batch,), dtype=torch.int32)
        if is_readable(q):
            first = torch.zeros_like(length) if start is None else start
            ends = torch.where(length > 0, first.long() + length.long(), 0)
            if bool((first < 0).any()) or bool((ends > values.shape[size]).any()):
                got = f"{axis}s {first.tolist()} + {length.tolist()}"
                takes = f"what lies within its {values.shape[size]} {axis}s"
                raise ArgumentError(describe(f"{name}.{axis}_start", got, takes))

"""Launches of Hopper's prefill kernel, and what it doesn't offer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import arguments
from .boxes import gluon_box, layout_of
from .check import Call
from .launch import is_hopper
from .results import Results
from .tile_lists import NO_LISTS, row_lists
from .tiles import SUPER_ROWS, slot_count

# The tile of a warpgroup, which is a decision tile, and the channels of a box.
_ROWS, _KEYS, _CHANNELS = 64, 128, 64
# Tiles of keys, and of values, that fit a program's shared memory, by head dims.
_STAGES = {(64, 64): 4, (128, 128): 2, (192, 128): 2, (256, 256): 1}
# Fewer rows of a page would be many small copies.
_LEAST_PAGE = 16


@dataclass(frozen=True)
class HopperVariant:
    """Compile-time constants of the kernel, as in `Variant`. STAGES: tiles of keys, and of values."""

    HEAD_DIM: int
    HEAD_DIM_V: int
    PAGE: int
    STAGES: int
    CAUSAL: bool
    HAS_LOWER_EDGE: bool
    HAS_SINKS: bool
    SKIP: bool
    GIVEN: bool
    STORE_TILES: bool
    WEIGH_SKIPPED: bool
    EXACT: bool
    ONLY_PREFILL: bool

    @property
    def IS_WIDE(self) -> bool:
        """Sums take so many registers that no weights can wait in others, and tiles so much shared memory."""
        return self.STAGES == 1


def prefill_refusals(call: Call) -> Iterator[str]:
    """Why the kernel doesn't compute the sequences of a checked call that prefill; nothing if it does."""
    q, k, v, plan = call.q, call.k, call.v, call.plan
    if not is_hopper(q.device):
        yield "the GPU isn't one of compute capability 9.0"
    if q.dtype not in (torch.float16, torch.bfloat16) or k.dtype != q.dtype:
        yield f"{q.dtype} queries and {k.dtype} keys"
    if (q.shape[-1], v.shape[-1]) not in _STAGES:
        yield f"head dims {q.shape[-1]} and {v.shape[-1]}"
    for name in ("mask", "bias", "bounds", "softcap"):
        if getattr(call, name) is not None:
            yield f"a {name}" if name != "bounds" else "bounds of each row"
    if plan.nm is not None:
        yield "N:M sparsity"
    decides = plan.skip or plan.tiles
    if decides is not None and (decides.block_rows, decides.block_keys) != (_ROWS, _KEYS):
        yield f"decision tiles of {decides.block_rows} rows and {decides.block_keys} keys"
    if plan.skip is not None and plan.skip.count_thresholds:
        yield "further thresholds to count"
    if plan.skip is not None and plan.skip.histogram:
        yield "a histogram"
    if call.block_tables is not None and _rows_of_box(call) is None:
        yield f"pages of {k.shape[1]} tokens"
    layouts = [layout_of(x) for x in (q, k, v)]
    if None in layouts or layouts[1][:2] != layouts[2][:2]:  # type: ignore[index]
        yield "strides that no tensor descriptor takes"


def _rows_of_box(call: Call) -> int | None:
    """Keys that one copy fetches: a tile, or the part of it that lies in one page; None where none does."""
    if call.block_tables is None or call.k.shape[1] % _KEYS == 0:
        return _KEYS
    page: int = call.k.shape[1]
    return page if page >= _LEAST_PAGE and _KEYS % page == 0 else None


def launch_hopper_prefill(call: Call, results: Results, only_prefill: bool) -> None:
    """Computes the sequences of a call that prefill, if there are no `prefill_refusals`."""
    from .hopper.prefill import hopper_prefill_kernel
    from .hopper.sizes import REGISTERS, WARPS

    q, k, v, seqs, plan = call.q, call.k, call.v, call.seqs, call.plan
    (rows, heads), batch = q.shape[:2], seqs.q_len.shape[0]
    blocks = slot_count(rows, batch, seqs.max_q, SUPER_ROWS)
    box_rows = _rows_of_box(call)
    q_layout, k_layout, v_layout = (layout_of(x) for x in (q, k, v))
    assert box_rows and q_layout and k_layout and v_layout and call.scale is not None
    if not blocks:
        return
    skip, tiles = plan.skip, plan.tiles
    C = HopperVariant(
        HEAD_DIM=q.shape[-1],
        HEAD_DIM_V=v.shape[-1],
        PAGE=0 if call.block_tables is None else k.shape[1],
        STAGES=_STAGES[q.shape[-1], v.shape[-1]],
        CAUSAL=call.causal,
        HAS_LOWER_EDGE=call.window is not None,
        HAS_SINKS=call.sinks is not None,
        SKIP=skip is not None,
        GIVEN=tiles is not None,
        STORE_TILES=skip is not None and results.words is not None,
        WEIGH_SKIPPED=skip is not None and (results.dropped is not None or skip.exact_normalizer),
        EXACT=skip is not None and skip.exact_normalizer,
        ONLY_PREFILL=only_prefill,
    )
    lists = NO_LISTS if tiles is None else row_lists(tiles.words.contiguous(), blocks, 2)
    dropped = results.dropped
    if C.WEIGH_SKIPPED and dropped is None:
        dropped = torch.empty_like(results.lse)
    k_table, v_table, k_table_stride, v_table_stride, _, _ = arguments.pages(call)
    hopper_prefill_kernel[(blocks * heads,)](
        gluon_box(q, q_layout, _ROWS, _CHANNELS), gluon_box(k, k_layout, box_rows, _CHANNELS),
        gluon_box(v, v_layout, box_rows, _CHANNELS), q_layout[0], q_layout[2], *k_layout, v_layout[2],
        results.out, results.lse, arguments.strides(results.out),
        k_table, v_table, k_table_stride, v_table_stride,
        *arguments.sequences(seqs), blocks, heads, heads // k.shape[-2],
        arguments.window(call.window), call.sinks, call.scale / math.log(2), call.v_scale,
        *arguments.threshold(skip, batch, heads, q.device),
        results.prefill, results.words, 0 if results.words is None else results.words.shape[2],
        *lists, 0 if lists[0] is None else lists[0].shape[2], results.bound, dropped,
        C, num_warps=WARPS.value, maxnreg=REGISTERS,
    )  # fmt: skip

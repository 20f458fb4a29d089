"""Launches of the prefill kernel."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from . import arguments
from .boxes import boxes
from .check import Call
from .device.variant import Variant
from .hopper_prefill import launch_hopper_prefill, prefill_refusals
from .launch import Launch, may_be_late, prefill_launch, shared_memory, thriftier
from .launching import launch_first_that_fits
from .programs.prefill import prefill_kernel
from .results import Results, scratch
from .tile_lists import NO_LISTS, row_lists
from .tiles import SUPER_ROWS, slot_count


def launch_prefill(call: Call, results: Results, *, only_prefill: bool = False) -> None:
    """Computes the sequences of a checked call that prefill.

    Args:
        call: its scale is above 0. `skip_decode` of its plan doesn't matter.
        only_prefill: leave out sequences of one row; else all prefill.
    """
    skip = call.plan.skip
    if skip is not None and skip.threshold is None:
        # Only counted: the output stays that of the dense kernel, to the bit.
        _launch(call, scratch(results), only_prefill)
        call = call._replace(plan=replace(call.plan, skip=None))
    elif skip is not None and (skip.count_thresholds or skip.histogram):
        only_in_force = replace(skip, count_thresholds=(), histogram=False)
        uncounted = call._replace(plan=replace(call.plan, skip=only_in_force))
        if next(prefill_refusals(uncounted), None) is None:
            # What counts isn't what computes: the output stays that of the kernel that doesn't count, and
            # so do the decisions.
            assert results.prefill is not None
            _launch(call, scratch(results)._replace(words=None), only_prefill)
            results.prefill[:2].zero_()
            call = uncounted
    _launch(call, results, only_prefill)


def _launch(call: Call, results: Results, only_prefill: bool) -> None:
    if next(prefill_refusals(call), None) is None:
        launch_hopper_prefill(call, results, only_prefill)
        return
    plan = call.plan
    decision = None
    if (decides := plan.skip or plan.tiles) is not None:
        assert decides.block_rows is not None
        decision = decides.block_rows, decides.block_keys
    best = prefill_launch(
        (call.q.shape[-1], call.v.shape[-1]),
        call.q.element_size(),
        plan.nm is not None,
        decision,
        plan.skip is not None,
        arguments.grid_bytes(call),
        shared_memory(call.q.device),
    )
    late = may_be_late(call.v.shape[-1])
    launches = thriftier(best, *(decision or (16, 16)), may_be_late=late)
    launch_first_that_fits(launches, partial(_launch_as, call, results, only_prefill, decision))


def _launch_as(
    call: Call,
    results: Results,
    only_prefill: bool,
    decision: tuple[int, int] | None,
    launch: Launch,
) -> None:
    q, k, v, seqs, plan = call.q, call.k, call.v, call.seqs, call.plan
    (rows, heads), batch = q.shape[:2], seqs.q_len.shape[0]
    super_blocks = slot_count(rows, batch, seqs.max_q, SUPER_ROWS)
    if not super_blocks:
        return
    nm, skip, tiles = plan.nm, plan.skip, plan.tiles
    pieces = 2 if call.block_tables is not None and 2 * k.shape[1] == launch.block_n else 1
    piece = launch.block_n // pieces
    (k_boxes, v_boxes), box_rows, box_columns = boxes(
        (k, v), piece, is_wanted=nm is None and arguments.in_one_page(call, piece)
    )
    C = Variant(
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        STAGES=launch.stages,
        HAS_LOWER_EDGE=call.bounds is not None or call.window is not None or nm is not None,
        BOXES=k_boxes is not None,
        PIECES=1 if k_boxes is None else pieces,
        N=nm.n if nm else 0,
        M=nm.m if nm else 4,
        SKIP=skip is not None,
        GIVEN=tiles is not None,
        GROUPS=launch.block_m // decision[0] if decision else 1,
        STORE_TILES=skip is not None and results.words is not None,
        LATE_VALUES=launch.late_values,
        WEIGH_SKIPPED=skip is not None and (results.dropped is not None or skip.exact_normalizer),
        EXACT=skip is not None and skip.exact_normalizer,
        THRESHOLDS=arguments.padded(len(skip.count_thresholds)) if skip else 0,
        HISTOGRAM=skip is not None and skip.histogram,
        ONLY_PREFILL=only_prefill,
        **arguments.features(call),
    )
    blocks = super_blocks * (SUPER_ROWS // launch.block_m)
    lists = NO_LISTS
    if tiles is not None:
        lists = row_lists(tiles.words.contiguous(), blocks, C.GROUPS)
    dropped = results.dropped
    if C.WEIGH_SKIPPED and dropped is None:
        dropped = torch.empty_like(results.lse)
    prefill_kernel[(blocks * heads,)](
        q, k, v, results.out, results.lse, k_boxes, v_boxes, *box_rows, *box_columns,
        *(arguments.strides(x) for x in (q, k, v, results.out)),
        *arguments.pages(call),
        *arguments.sequences(seqs), super_blocks, heads, heads // k.shape[-2],
        call.bounds, arguments.window(call.window),
        *arguments.grid(call.mask, seqs), *arguments.grid(call.bias, seqs),
        call.sinks, call.scale, call.softcap or 0.0, call.v_scale,
        *arguments.shields(nm),
        *arguments.threshold(skip, batch, heads, q.device), arguments.counted_thresholds(skip),
        results.prefill, results.words, 0 if results.words is None else results.words.shape[2],
        *lists, 0 if lists[0] is None else lists[0].shape[2], results.bound, dropped,
        C, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip

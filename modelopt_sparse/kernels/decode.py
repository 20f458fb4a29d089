"""Launches of the decode kernel: seeds, splits, and their sum."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from modelopt_sparse.errors import UnsupportedCall, describe

from . import arguments
from .boxes import boxes
from .check import Call
from .device.variant import Variant
from .latent import has_values_in_keys, latent_refusals, launch_latent
from .launch import (
    LEAST_LATE,
    Launch,
    decode_launch,
    may_be_late,
    power_of_two,
    shared_memory,
    split_dim,
    thriftier,
)
from .launching import launch_first_that_fits
from .programs.decode import decode_kernel
from .results import Results, scratch
from .splits import Splits, merge
from .types import Phase

# Rows of a sequence that decode together in one program, and rows of all its heads, at most.
MOST_ROWS_OF_A_SEQUENCE = 16
MOST_ROWS = 256


@dataclass(frozen=True)
class DecodeVariant(Variant):
    """Compile-time constants of the decode kernel.

    Args:
        HEADS: query heads of a program, rounded up to a power of two.
        ALL_DECODE: sequences of more than one row decode too.
        ONLY_SEEDS: nothing is computed but where the running max of each row begins.
        REST, BLOCK_REST: channels behind the first HEAD_DIM, and the power of two that holds them.
        V_IN_K: values are the first channels of keys, which are loaded once.
        IS_SPLIT: sums are stored for `merge_kernel`; else there is one split, and its sums are all.
    """

    HEADS: int = 1
    ALL_DECODE: bool = False
    ONLY_SEEDS: bool = False
    IS_SPLIT: bool = False
    REST: int = 0
    BLOCK_REST: int = 0
    V_IN_K: bool = False


def launch_decode(call: Call, results: Results) -> None:
    """Computes the sequences of a checked call that decode; other rows stay as they are.

    Args:
        call: its scale is above 0. Of its plan only `skip_decode` matters.
    Raises:
        UnsupportedCall: more rows would vote together than a program has.
    """
    if not results.out.numel() or not call.seqs.q_len.shape[0]:
        return
    skip = call.plan.skip_decode
    if skip is not None and skip.threshold is None:
        # Only counted: the output stays that of a call without.
        _launch(call, scratch(results))
        call = call._replace(plan=replace(call.plan, skip_decode=None))
    _launch(call, results)


def rows_of(call: Call) -> tuple[int, int]:
    """Query heads of a program, and rows of a sequence, at most."""
    skip = call.plan.skip_decode
    members = (skip and skip.vote_heads) or call.q.shape[1] // call.k.shape[-2]
    return members, max(1, call.seqs.max_q) if call.phase is Phase.DECODE else 1


def _launch(call: Call, results: Results) -> None:
    q, v, skip = call.q, call.v, call.plan.skip_decode
    members, max_q = rows_of(call)
    if skip is not None and members * max_q > MOST_ROWS:
        remedy = "Use fewer vote_heads, phase=Phase.PREFILL, or attention_reference."
        got, takes = f"{members * max_q} rows that vote together", f"at most {MOST_ROWS}"
        raise UnsupportedCall(describe("plan.skip_decode", got, takes, remedy))
    if next(latent_refusals(call, members * max_q), None) is None:
        launch_latent(call, results, max_q)
        return
    block_keys = None if skip is None else skip.block_keys
    best = decode_launch(
        (q.shape[-1], v.shape[-1]),
        q.element_size(),
        members * max_q,
        block_keys,
        shared_memory(q.device),
        has_values_in_keys(call),
    )
    least = (16, 16) if block_keys is None else (best.block_m, block_keys)
    launches = thriftier(best, *least)
    launch_first_that_fits(launches, partial(_launch_as, call, results, members, max_q))


def _launch_as(call: Call, results: Results, members: int, max_q: int, launch: Launch) -> None:
    q, k, v, seqs, skip = call.q, call.k, call.v, call.seqs, call.plan.skip_decode
    heads, batch = q.shape[1], seqs.q_len.shape[0]
    exact = skip is not None and skip.exact_normalizer
    words = None if skip is None else results.decode_words
    splits = Splits.of(call, max_q)
    seeds = None
    if skip is not None:
        seeds = torch.empty((batch, max_q, heads), dtype=torch.float32, device=q.device)
    main, rest = split_dim(k.shape[-1])
    parts = (k[..., :main], v, k[..., main:]) if rest else (k, v)
    # Values are loaded late, and so must not be narrow where a program has rows enough for a warpgroup.
    is_narrow = launch.block_m >= 64 and not may_be_late(v.shape[-1])
    is_wanted = arguments.in_one_page(call, launch.block_n) and not is_narrow
    found, box_rows, box_columns = boxes(parts, launch.block_n, is_wanted)
    if not rest:
        found, box_columns = [*found, None], [*box_columns, 0]
    C = DecodeVariant(
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        STAGES=launch.stages,
        HAS_LOWER_EDGE=call.bounds is not None or call.window is not None,
        BOXES=found[0] is not None,
        SKIP=skip is not None,
        STORE_TILES=words is not None,
        WEIGH_SKIPPED=skip is not None and (results.dropped is not None or exact),
        EXACT=exact,
        THRESHOLDS=arguments.padded(len(skip.count_thresholds)) if skip else 0,
        HISTOGRAM=skip is not None and skip.histogram,
        HEADS=power_of_two(members),
        ALL_DECODE=call.phase is Phase.DECODE,
        IS_SPLIT=splits.count > 1,
        V_IN_K=has_values_in_keys(call),
        **arguments.features(call)
        | _channels(q.shape[-1])
        | ({"BLOCK_DV": LEAST_LATE} if is_narrow else {}),
    )
    blocks = -(-members * max_q // C.BLOCK_M)
    units = batch * (heads // members) * blocks

    def run(C: DecodeVariant, count: int) -> None:
        decode_kernel[(units * count,)](
            q, k, v, results.out, results.lse, seeds, splits.sums, splits.out,
            *found, *box_rows, *box_columns,
            *(arguments.strides(x) for x in (q, k, v, results.out)),
            *arguments.pages(call),
            *arguments.sequences(seqs)[:4], heads, heads // k.shape[-2], members, blocks, max_q, count,
            *splits.tiles(C.BLOCK_N), splits.entries,
            call.bounds, arguments.window(call.window),
            *arguments.grid(call.mask, seqs), *arguments.grid(call.bias, seqs),
            call.sinks, call.scale, call.softcap or 0.0, call.v_scale,
            *arguments.threshold(skip, batch, heads, q.device), arguments.counted_thresholds(skip),
            results.decode, skip.segment_keys // skip.block_keys if skip else 1,
            words, 0 if words is None else words.shape[2], results.bound, results.dropped,
            C, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    if skip is not None:
        seeds_of = replace(C, ONLY_SEEDS=True, STORE_TILES=False, IS_SPLIT=False)
        run(replace(seeds_of, THRESHOLDS=0, HISTOGRAM=False), 1)
    run(C, splits.count)
    if splits.count > 1:
        merge(call, results, splits, max_q)


def _channels(dim: int) -> dict[str, int]:
    main, rest = split_dim(dim)
    if not rest:
        return {"HEAD_DIM": dim, "BLOCK_D": main}
    return {"HEAD_DIM": main, "BLOCK_D": main, "REST": dim - main, "BLOCK_REST": rest}

"""The loop: visits key tiles, decides, and accumulates softmax(scores) @ V."""

from __future__ import annotations

import triton
import triton.language as tl

from modelopt_sparse.kernels.device.scores import (
    add_values,
    columns_to_keys,
    load_k,
    load_v,
    multiply_keys,
    pages_at,
    seen_keys,
    transform,
    visible,
)
from modelopt_sparse.kernels.device.softmax import bound_of, rescale
from modelopt_sparse.kernels.device.visits import ordered_tile, takes_part
from modelopt_sparse.kernels.stages.nm import nm_select, nm_shielded
from modelopt_sparse.kernels.stages.skip import (
    add_to_histogram,
    bit_count,
    count_skipped,
    gather_tiles,
    vote,
)


@triton.jit
def tile_of(visit, order, given_tiles, C: tl.constexpr):
    """The key tile of a visit; arguments are those of `attend`."""
    if C.GIVEN:
        return tl.load(given_tiles + visit).to(tl.int32)
    elif C.SKIP:
        return ordered_tile(visit, order)
    else:
        return order[0] - visit


@triton.jit
def attend(
    state, start, stop, q, kv, rows, visits, given, words, grids, numbers, skipping,
    C: tl.constexpr, IS_EDGE: tl.constexpr,
):  # fmt: skip
    """Attends to the key tiles of visits number `start` to `stop`.

    Args:
        state: (acc [BLOCK_M, BLOCK_DV], total, running, bound, lost [BLOCK_M], tallies): sums of exponentials
            kept, running max (log2), bound on and sum of exponentials skipped, and tile counts.
        q: [BLOCK_M, BLOCK_D].
        kv: see `load_k`.
        rows: (position, low, high, is_row, group [BLOCK_M], first_key, stop_key, has_gaps): what rows see,
            from the first key to one past the last, and whether there may be keys in between that none sees.
        visits: (order, last, first), see `visits`.
        given: pointers to a list's tiles and to the row tiles that compute them.
        words: (pointer, step), where decisions are stored.
        grids: (mask, bias) as for `visible`.
        numbers: (n_k, factor, scale_log2, softcap, nm): `factor` makes log2 scores of C.IS_RAW ones.
        skipping: (log2(lambda), further thresholds [THRESHOLDS], histogram).
        IS_EDGE: in these tiles a row may not see a key, or not take part; else all rows see all keys.
    Returns:
        state.
    """
    acc, total, running, bound, lost, tallies = state
    visible_tiles, skipped_tiles, below, pending = tallies
    position, low, high, is_row, group, first_key, stop_key, has_gaps = rows
    order, last, first = visits
    given_tiles, given_groups = given
    mask, bias = grids
    n_k, factor, scale_log2, softcap, nm = numbers
    threshold, counted, histogram = skipping
    V_BY_BOX: tl.constexpr = C.BOXES and not IS_EDGE
    # With late values two programs share a multiprocessor, and there is no room for more at edges.
    STAGES: tl.constexpr = 1 if IS_EDGE and C.LATE_VALUES else C.STAGES
    # A loop ends while its last product is still being computed. In a branch of its own, the sums
    # of a loop that does not run (zeros, set just then) meet the result only after the wait for it;
    # otherwise ptxas may serialise all products (C7515).
    if start < stop:
        pages = pages_at(kv, tile_of(start, order, given_tiles, C), stop_key, C)
        for visit in tl.range(start, stop, num_stages=STAGES):
            tile = tile_of(visit, order, given_tiles, C)
            takes_rows = is_row
            if C.GIVEN:
                if C.GROUPS > 1:
                    groups = tl.load(given_groups + visit).to(tl.int32)
                    takes_rows = is_row & (((groups >> group) & 1) != 0)
            elif C.SKIP:
                if IS_EDGE:
                    takes_rows = is_row & takes_part(visit, tile, order, last, first)

            # The values are loaded before it is known whether they are needed: so the load stays in
            # the pipeline.
            keys = tile * C.BLOCK_N + columns_to_keys(C)
            is_key = (keys >= first_key) & (keys < stop_key)
            shown = None
            is_seen = None
            if IS_EDGE:
                shown = is_key
                is_seen = seen_keys(keys, is_key, low, high, takes_rows, has_gaps, grids, C)
            # What a hidden key holds reaches hidden scores only, so that boxes do at edges too.
            k_tile = load_k(kv, tile, pages, shown, C, C.BOXES)
            if not C.LATE_VALUES:
                v_tile = load_v(kv, tile, pages, is_seen, C, V_BY_BOX)

            scores = multiply_keys(q, k_tile, C, C.PIECES == 2)
            scores = transform(scores, keys, n_k, is_row, bias, scale_log2, softcap, C)
            if IS_EDGE:
                seen = visible(keys, low, high, takes_rows, mask, bias, C)
                scores = tl.where(seen, scores, float("-inf"))
            if C.N > 0:
                chosen = nm_select(scores, C.N, C.M)
                if IS_EDGE:
                    chosen = tl.where(nm_shielded(position, keys, nm[0], nm[1]), scores, chosen)
                scores = chosen
            raw_max = tl.max(scores, 1)
            tile_max = raw_max * factor

            SELECTS: tl.constexpr = C.GROUPS > 1 and (C.SKIP or C.GIVEN)
            stays = takes_rows
            any_kept = True
            if C.SKIP:
                kept, seen_by = vote(tile_max, running, threshold, is_row, group)
                any_kept = kept != 0
                visible_tiles += bit_count(seen_by, C.GROUPS)
                skipped_tiles += bit_count(seen_by ^ kept, C.GROUPS)
                if C.THRESHOLDS > 0:
                    below = count_skipped(
                        tile_max, running, counted, is_row, group, below, C.GROUPS, C.THRESHOLDS
                    )
                if C.HISTOGRAM:
                    add_to_histogram(tile_max, running, is_row, group, histogram, C.GROUPS)
                if C.STORE_TILES:
                    # Beyond edges, tiles come one after the other: a word is stored when it is full.
                    is_full = True
                    if not IS_EDGE:
                        is_full = ((tile & 31) == 0) | (visit == stop - 1)
                    pending = gather_tiles(
                        pending, words[0], words[1], tile, kept, is_full, C.GROUPS
                    )
                stays = ((kept >> group) & 1) != 0

            if C.WEIGH_SKIPPED or any_kept:
                if SELECTS and not C.WEIGH_SKIPPED:
                    tile_max = tl.where(stays, tile_max, float("-inf"))
                new, pivot, alpha = rescale(running, tile_max)
                if C.SKIP:
                    # Where a row's tile is skipped, alpha is 1.
                    added = alpha * 0
                    if C.GROUPS > 1 or C.WEIGH_SKIPPED:
                        added = tl.where(stays, 0.0, bound_of(raw_max, factor, running, C.BLOCK_N))
                    bound = tl.fma(bound, alpha, added)
                if SELECTS and not C.WEIGH_SKIPPED:
                    # Exponentials of rows whose tile is skipped are 0.
                    pivot = tl.where(stays, pivot, float("inf"))
                acc *= alpha[:, None]
                p = tl.exp2(scores * factor - pivot[:, None])
                tile_sum = tl.sum(p, 1)
                if C.LATE_VALUES:
                    v_tile = load_v(kv, tile, pages, is_seen, C, V_BY_BOX)
                if C.WEIGH_SKIPPED:
                    p = tl.where(stays[:, None], p, 0.0)
                    lost = tl.fma(lost, alpha, tl.where(stays, 0.0, tile_sum))
                    tile_sum = tl.where(stays, tile_sum, 0.0)
                acc = add_values(acc, p, v_tile, C, C.PIECES == 2 and V_BY_BOX)
                total = tl.fma(total, alpha, tile_sum)
                running = new
            elif C.SKIP:
                bound += bound_of(raw_max, factor, running, C.BLOCK_N)
            if C.PAGE > 0:
                following = tl.minimum(visit + 1, stop - 1)
                pages = pages_at(kv, tile_of(following, order, given_tiles, C), stop_key, C)
    return acc, total, running, bound, lost, (visible_tiles, skipped_tiles, below, pending)

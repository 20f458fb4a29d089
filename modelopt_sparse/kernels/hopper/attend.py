"""A warpgroup that attends for 64 rows.

While it takes exponentials, its last product with values and the other warpgroup's products go on.
Source: FlashAttention-3 (arXiv 2407.08608).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .places import limits_of, takes_part, tile_of
from .sizes import CHANNELS, KEYS, ROWS, WARPS
from .softmax import State, is_needed, leave_out, rescale, weigh
from .store import Tallies, store
from .votes import declare_votes


class Block(NamedTuple):
    """The rows of a program, and what they see.

    Args:
        start: position of the first warpgroup's first row; the sequence's are [first, first + n_q).
        n_k, window: keys of the sequence, and how many a row sees.
        first_row: of the sequence, in the packed tensors.
    """

    start: Any
    first: Any
    n_q: Any
    n_k: Any
    window: Any
    first_row: Any


class Rule(NamedTuple):
    """How scores become decisions.

    Args:
        factor: makes log2 scores of products. threshold: log2(lambda).
        words: pointers to the words of decisions of each warpgroup's row tile.
    """

    factor: Any
    threshold: Any
    words: Any


class Work(NamedTuple):
    """What the visits of a warpgroup share.

    Args:
        zero: scores of zero.
        is_row, low, high: [64], whether there is such a row, and the keys [low, high) that it sees.
        has_rows: 1 if it has some.
        words: of its decisions.
    """

    zero: Any
    buffers: Any
    barriers: Any
    visits: Any
    rule: Any
    is_row: Any
    low: Any
    high: Any
    has_rows: Any
    words: Any


@gluon.jit
def await_keys(visit, work, C: gl.constexpr):
    mbarrier.wait(work.barriers.keys_there.index(visit % C.STAGES), visit // C.STAGES & 1)


@gluon.jit
def await_values(visit, work, C: gl.constexpr):
    mbarrier.wait(work.barriers.values_there.index(visit % C.STAGES), visit // C.STAGES & 1)


@gluon.jit
def release_keys(visit, work, C: gl.constexpr):
    mbarrier.arrive(work.barriers.keys_free.index(visit % C.STAGES), count=1)


@gluon.jit
def release_values(visit, work, C: gl.constexpr):
    mbarrier.arrive(work.barriers.values_free.index(visit % C.STAGES), count=1)


@gluon.jit
def start_scores(visit, work, HALF: gl.constexpr, C: gl.constexpr):
    """Waits for the keys of a visit, and starts the products of the rows and them."""
    PIECES: gl.constexpr = C.HEAD_DIM // CHANNELS
    stage = visit % C.STAGES
    await_keys(visit, work, C)
    product = work.zero
    for piece in gl.static_range(PIECES):
        product = warpgroup_mma(
            work.buffers.q.index(HALF * PIECES + piece),
            work.buffers.k.index(stage * PIECES + piece).permute((1, 0)),
            product,
            use_acc=piece > 0,
            is_async=True,
        )
    return product


@gluon.jit
def hide(score, tile, takes, work, C: gl.constexpr):
    """The scores of a tile, -inf where a row sees no key."""
    column = gl.arange(0, KEYS, layout=gl.SliceLayout(0, score.type.layout))
    key = gl.expand_dims(tile * KEYS + column, 0)
    seen = key < gl.expand_dims(gl.where(work.is_row & takes, work.high, 0), 1)
    if C.HAS_LOWER_EDGE:
        seen = seen & (key >= gl.expand_dims(work.low, 1))
    return gl.where(seen, score, float("-inf"))


@gluon.jit
def tally(kept, seen, tile, is_last_of_word, tallies, words, C: gl.constexpr):
    """Counts a decision, and adds it to its word. Tiles come in falling order."""
    pending = tallies.pending
    if C.STORE_TILES:
        pending = pending << 1 | kept
        if is_last_of_word:
            bits = pending << (tile & 31)
            if bits != 0:
                gl.atomic_or(words + (tile >> 5), bits, sem="relaxed")
            pending = pending * 0
    return Tallies(tallies.visible + seen, tallies.skipped + (seen ^ kept), pending)


@gluon.jit
def judge(
    score, tile, takes, is_edge, state, tallies, work, HALF: gl.constexpr, C: gl.constexpr
):  # fmt: skip
    """Whether a tile is kept, its scores and largest scores, and the tallies with the decision.

    Args:
        is_edge: what `has_edge` tells.
    """
    if is_edge:
        score = hide(score, tile, takes, work, C)
    raw_max = gl.max(score, 1)
    kept = 1
    if C.SKIP:
        kept = is_needed(
            raw_max * work.rule.factor, state.running, work.rule.threshold, work.is_row, HALF
        )
        seen = takes.to(gl.int32) & work.has_rows
        is_last_of_word = is_edge | ((tile & 31) == 0) | (tile == work.visits.bottom + 1)
        tallies = tally(kept, seen, tile, is_last_of_word, tallies, work.words, C)
    return kept, score, raw_max, tallies


@gluon.jit
def seek(visit, work, HALF: gl.constexpr, C: gl.constexpr):
    """The key tile of a visit, and whether it is the warpgroup's."""
    tile = tile_of(visit, work.visits, C)
    return tile, takes_part(visit, tile, work.visits, HALF, C)


@gluon.jit
def has_edge(visit, tile, work, C: gl.constexpr):
    """Whether rows may not see all keys of a tile, or the warpgroup may not take part in it."""
    is_edge = tile > work.visits.full_top
    if C.HAS_LOWER_EDGE or C.SKIP or C.GIVEN:
        n_ends = work.visits.n_last + work.visits.n_first
        is_edge = is_edge | (tile < work.visits.full_bottom) | (visit < n_ends)
    return is_edge


@gluon.jit
def attend_in_turn(acc, state, tallies, work, HALF: gl.constexpr, C: gl.constexpr):
    """All visits, each to its end. Sums of 256 channels leave no registers for the weights of another."""
    factor = work.rule.factor
    of_weights: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, k_width=2)
    for visit in range(0, work.visits.n):
        tile, takes = seek(visit, work, HALF, C)
        is_idle = False
        if C.GIVEN:
            is_idle = takes == 0
        if is_idle:
            await_keys(visit, work, C)
            release_keys(visit, work, C)
            await_values(visit, work, C)
        else:
            product = start_scores(visit, work, HALF, C)
            score = warpgroup_mma_wait(0, deps=(product,))
            release_keys(visit, work, C)
            kept, score, raw_max, tallies = judge(
                score, tile, takes, has_edge(visit, tile, work, C), state, tallies, work, HALF, C
            )
            if kept != 0:
                p, state, alpha = weigh(score, raw_max, factor, state, C)
                acc = rescale(acc, alpha, HALF, C)
                values = work.buffers.v.index(visit % C.STAGES)
                weights = gl.convert_layout(p.to(values.dtype), of_weights)
                await_values(visit, work, C)
                adding = warpgroup_mma(weights, values, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(adding,))
            else:
                state = leave_out(score, raw_max, factor, state, C)
                await_values(visit, work, C)
        release_values(visit, work, C)
    return acc, state, tallies


@gluon.jit
def start_attending(acc, state, tallies, work, HALF: gl.constexpr, C: gl.constexpr):
    """Visit 0, up to its weights: its values are added by `attend_tiles` or `add_last`.

    Returns:
        weights, whether they are wanted, state, tallies.
    """
    of_weights: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, k_width=2)
    tile, takes = seek(0, work, HALF, C)
    product = start_scores(0, work, HALF, C)
    score = warpgroup_mma_wait(0, deps=(product,))
    release_keys(0, work, C)
    kept, score, raw_max, tallies = judge(score, tile, takes, True, state, tallies, work, HALF, C)
    if C.GIVEN:
        kept = takes.to(gl.int32)
    p = work.zero
    if kept != 0:
        p, state, alpha = weigh(score, raw_max, work.rule.factor, state, C)
    else:
        state = leave_out(score, raw_max, work.rule.factor, state, C)
    weights = gl.convert_layout(p.to(work.buffers.v.dtype), of_weights)
    return weights, kept, state, tallies


@gluon.jit
def attend_tiles(
    acc, weights, kept, state, tallies, work, HALF: gl.constexpr, C: gl.constexpr
):  # fmt: skip
    """All visits but the first. The values of one are added while the next is scored, and decided upon."""
    factor = work.rule.factor
    of_weights: gl.constexpr = weights.type.layout
    next_tile, next_takes = seek(gl.minimum(1, work.visits.n - 1), work, HALF, C)
    for visit in range(1, work.visits.n):
        tile, takes = next_tile, next_takes
        next_tile, next_takes = seek(gl.minimum(visit + 1, work.visits.n - 1), work, HALF, C)
        is_edge = has_edge(visit, tile, work, C)
        before = work.buffers.v.index((visit - 1) % C.STAGES)
        is_idle = False
        if C.GIVEN:
            is_idle = takes == 0
        if is_idle:
            await_keys(visit, work, C)
            release_keys(visit, work, C)
            await_values(visit - 1, work, C)
            if kept != 0:
                adding = warpgroup_mma(weights, before, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(adding,))
            kept = kept * 0
        else:
            product = start_scores(visit, work, HALF, C)
            await_values(visit - 1, work, C)
            if kept != 0:
                adding = warpgroup_mma(weights, before, acc, is_async=True)
                score = warpgroup_mma_wait(1, deps=(product,))
                release_keys(visit, work, C)
                kept, score, raw_max, tallies = judge(
                    score, tile, takes, is_edge, state, tallies, work, HALF, C
                )
                if kept != 0:
                    p, state, alpha = weigh(score, raw_max, factor, state, C)
                    acc = warpgroup_mma_wait(0, deps=(adding,))
                    weights = gl.convert_layout(p.to(weights.dtype), of_weights)
                    acc = rescale(acc, alpha, HALF, C)
                else:
                    acc = warpgroup_mma_wait(0, deps=(adding,))
                    state = leave_out(score, raw_max, factor, state, C)
            else:
                score = warpgroup_mma_wait(0, deps=(product,))
                release_keys(visit, work, C)
                kept, score, raw_max, tallies = judge(
                    score, tile, takes, is_edge, state, tallies, work, HALF, C
                )
                if kept != 0:
                    p, state, alpha = weigh(score, raw_max, factor, state, C)
                    weights = gl.convert_layout(p.to(weights.dtype), of_weights)
                    acc = rescale(acc, alpha, HALF, C)
                else:
                    state = leave_out(score, raw_max, factor, state, C)
        release_values(visit - 1, work, C)
    return acc, weights, kept, state, tallies


@gluon.jit
def add_last(acc, weights, kept, visit, work, C: gl.constexpr):
    """The sums with the values of the last visit."""
    await_values(visit, work, C)
    if kept != 0:
        values = work.buffers.v.index(visit % C.STAGES)
        adding = warpgroup_mma(weights, values, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(adding,))
    release_values(visit, work, C)
    return acc


@gluon.jit
def attend_rows(
    block, visits, rule, buffers, barriers, targets, HALF: gl.constexpr, C: gl.constexpr
):  # fmt: skip
    """One of the two warpgroups: attends for its rows, and stores what they come to."""
    declare_votes(HALF)
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, C.HEAD_DIM_V, 16])
    of_score: gl.constexpr = gl.SliceLayout(1, scores)
    begin = block.start + HALF * ROWS
    stop = block.first + block.n_q
    position = begin + gl.arange(0, ROWS, layout=of_score)
    is_row = (position >= block.first) & (position < stop)
    low, high = limits_of(position, block.n_k, block.window, C.CAUSAL)
    high = gl.where(is_row, high, low)
    has_rows = ((begin + ROWS > block.first) & (begin < stop)).to(gl.int32)
    work = Work(
        gl.full([ROWS, KEYS], 0.0, gl.float32, scores), buffers, barriers, visits, rule,
        is_row, low, high, has_rows, rule.words[HALF],
    )  # fmt: skip
    acc = gl.full([ROWS, C.HEAD_DIM_V], 0.0, gl.float32, sums)
    none = gl.full([ROWS], 0.0, gl.float32, of_score)
    unseen = none + float("-inf")
    state = State(unseen, unseen, none, none, none)
    n = begin * 0
    tallies = Tallies(n, n, n)
    mbarrier.wait(barriers.queries_there.index(HALF), 0)
    if C.IS_WIDE:
        acc, state, tallies = attend_in_turn(acc, state, tallies, work, HALF, C)
    elif visits.n > 0:
        weights, kept, state, tallies = start_attending(acc, state, tallies, work, HALF, C)
        acc, weights, kept, state, tallies = attend_tiles(
            acc, weights, kept, state, tallies, work, HALF, C
        )
        acc = add_last(acc, weights, kept, work.visits.n - 1, work, C)
    store(acc, state, tallies, position - block.first + block.first_row, is_row, targets, C)

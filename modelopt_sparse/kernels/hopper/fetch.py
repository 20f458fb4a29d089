"""The warp that fetches keys and values, ahead of the warpgroups that attend."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .common import load_box
from .places import tile_of
from .sizes import CHANNELS, KEYS, ROWS


class Source(NamedTuple):
    """Where the keys or values of a head lie.

    Args:
        box: descriptor of 128 keys, or of those of a page, and 64 channels.
        row, column: of the head's first key in the box, or of slot 0 of page 0.
        table: pages of the sequence, and page_rows from page to page.
        first_key, stop_key: the keys [first, stop) that some row of the program sees. A table may end there.
    """

    box: Any
    row: Any
    column: Any
    table: Any
    page_rows: Any
    first_key: Any
    stop_key: Any


@gluon.jit
def fetch_queries(box, queries, there, row, column, C: gl.constexpr):
    """Starts the copies of the queries of both warpgroups, which begin at a row and column of their box."""
    PIECES: gl.constexpr = C.HEAD_DIM // CHANNELS
    for half in gl.static_range(2):
        mbarrier.expect(there.index(half), PIECES * box.block_type.nbytes)
        for piece in gl.static_range(PIECES):
            at = [row + half * ROWS, column + piece * CHANNELS]
            load_box(box, at, there.index(half), queries.index(half * PIECES + piece))


@gluon.jit
def _fetch_piece(source, piece: gl.constexpr, tile, target, there, C: gl.constexpr):
    """Starts the copies of 64 channels of a tile, to [128, 64]: one, or one a page."""
    RUN: gl.constexpr = source.box.block_type.shape[0]
    RUNS: gl.constexpr = KEYS // RUN
    for run in gl.static_range(RUNS):
        key = tile * KEYS + run * RUN
        row = source.row + key
        if C.PAGE > 0:
            page = gl.load(source.table + key // C.PAGE, mask=key < source.stop_key, other=0)
            row = source.row + page * source.page_rows + key % C.PAGE
        part = target
        if RUN < KEYS:
            part = target.slice(run * RUN, RUN, dim=0)
        load_box(source.box, [row, source.column + piece * CHANNELS], there, part)


@gluon.jit
def fetch_keys(source, tile, stage, buffers, barriers, C: gl.constexpr):
    """Starts the copies of a tile of keys to a stage."""
    PIECES: gl.constexpr = C.HEAD_DIM // CHANNELS
    there = barriers.keys_there.index(stage)
    mbarrier.expect(there, KEYS * C.HEAD_DIM * 2)
    for piece in gl.static_range(PIECES):
        _fetch_piece(source, piece, tile, buffers.k.index(stage * PIECES + piece), there, C)


@gluon.jit
def _fetch_values(source, tile, target, there, C: gl.constexpr):
    """Starts the copies of a tile of values, to [128, Dv]."""
    PIECES: gl.constexpr = C.HEAD_DIM_V // CHANNELS
    mbarrier.expect(there, KEYS * C.HEAD_DIM_V * 2)
    for piece in gl.static_range(PIECES):
        part = target.slice(piece * CHANNELS, CHANNELS, dim=1)
        _fetch_piece(source, piece, tile, part, there, C)


@gluon.jit
def _clear(values, tile, source):
    """Clears the values of keys that no row sees: they may be NaN, and NaN times 0 is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    # A thread holds 32 bytes at a time: it may have no more than 24 registers.
    RUN: gl.constexpr = 8
    PIECES: gl.constexpr = values.shape[1] // CHANNELS
    for first in gl.static_range(0, KEYS, RUN):
        key = tile * KEYS + first + gl.arange(0, RUN, layout=gl.SliceLayout(1, layout))
        is_seen = gl.expand_dims((key >= source.first_key) & (key < source.stop_key), 1)
        for piece in gl.static_range(PIECES):
            part = values.slice(first, RUN, dim=0).slice(piece * CHANNELS, CHANNELS, dim=1)
            found = part.load(layout)
            part.store(gl.where(is_seen, found, 0.0).to(found.dtype))
    fence_async_shared()


@gluon.jit
def fetch(k_source, v_source, visits, buffers, barriers, C: gl.constexpr):
    """All values, and all keys but those of visit 0, in the order of visits, each when its stage is free."""
    if visits.n > 0:
        n_cleared = 0
        next_tile = tile_of(0, visits, C)
        for visit in range(0, visits.n):
            tile = next_tile
            next_tile = tile_of(gl.minimum(visit + 1, visits.n - 1), visits, C)
            stage = visit % C.STAGES
            parity = visit // C.STAGES & 1 ^ 1
            if visit > 0:
                mbarrier.wait(barriers.keys_free.index(stage), parity)
                fetch_keys(k_source, tile, stage, buffers, barriers, C)
            mbarrier.wait(barriers.values_free.index(stage), parity)
            target = buffers.v.index(stage)
            begins_seen = tile * KEYS >= v_source.first_key
            if begins_seen & ((tile + 1) * KEYS <= v_source.stop_key):
                _fetch_values(v_source, tile, target, barriers.values_there.index(stage), C)
            else:
                _fetch_values(v_source, tile, target, barriers.arrived, C)
                mbarrier.wait(barriers.arrived, n_cleared & 1)
                n_cleared += 1
                _clear(target, tile, v_source)
                mbarrier.arrive(barriers.values_there.index(stage), count=1)

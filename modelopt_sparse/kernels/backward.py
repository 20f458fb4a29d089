"""The backward pass of a checked call: gradients of query rows in one kernel, of keys and values in another.

Nothing is added atomically, so gradients are the same to the bit each time. Source: FlashAttention-2
(arXiv 2307.08691).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import arguments
from .boxes import boxes
from .check import Call
from .device.variant import Variant
from .launch import (
    Launch,
    backward_launch,
    processors,
    shared_memory,
    thriftier,
)
from .launching import clear_unowned, launch_first_that_fits, launching
from .programs.backward import (
    key_gradient_kernel,
    prepare_kernel,
    query_gradient_kernel,
)
from .programs.lists import column_lists_kernel
from .programs.shares import add_shares_kernel, shares_kernel
from .tile_lists import NO_LISTS, empty_lists, row_lists
from .tiles import SUPER_ROWS, WORD_BITS, slot_count
from .types import NMSparsity, Phase, TileMap

LOG2_E = 1.4426950408889634
# A program walks about as many row blocks as make this number of programs for each multiprocessor. Key tiles
# that no more than LEAST_VISITS see are not split.
SHARES = 2
LEAST_VISITS = 8


@dataclass(frozen=True)
class BackwardVariant(Variant):
    """Compile-time constants of a kernel of the backward pass.

    Args:
        TILE_ROWS, TILE_KEYS: the decision tile; no rows: all rows of a sequence are one tile.
        BITS: weights are masked with the decisions, bit by bit, in place of walking lists.
        BIAS_GRADIENT: the gradients of scores are stored.
        AHEAD: products with values are computed one visit ahead, for which there must be registers.
        MEMBERS: query heads of a KV head.
    """

    TILE_ROWS: int = 0
    TILE_KEYS: int = 0
    BITS: bool = False
    BIAS_GRADIENT: bool = False
    AHEAD: bool = False
    MEMBERS: int = 1

    @property
    def LIST_ROWS(self) -> int:
        """Query rows that a list of key tiles is of."""
        return max(self.BLOCK_M, self.TILE_ROWS)

    @property
    def LISTED(self) -> bool:
        """A list says which row blocks see a key tile."""
        return self.GIVEN or self.HAS_BOUNDS


@dataclass(frozen=True, eq=False)
class Part:
    """The sequences of a call that follow the same rules.

    Args:
        phase: whose sequences; None: all.
        tiles: what the forward pass computed; None: everything. exact: its normaliser counts the rest.
    """

    phase: Phase | None = None
    nm: NMSparsity | None = None
    tiles: TileMap | None = None
    exact: bool = False

    @property
    def decision(self) -> tuple[int, int] | None:
        """Rows and keys of a decision tile, where lists say which are computed."""
        if self.tiles is None or self.tiles.block_rows is None or self.exact:
            return None
        return self.tiles.block_rows, self.tiles.block_keys


def backward(
    call: Call,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    tiles: TileMap | None,
    decode_tiles: TileMap | None,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of a call's inputs.

    Args:
        out, lse: what the forward pass returned. d_out, d_lse: their gradients; lse is base 2.
        tiles, decode_tiles: the tiles that it computed, in each phase; None: all.
        bias_gradient: whether the bias wants a gradient.
    Returns:
        d_q, d_k, d_v, d_sinks (None without sinks), d_bias (None unless wanted).
    Raises:
        UnsupportedCall: the GPU is too small for it.
    """
    q, seqs = call.q, call.seqs
    rows, heads = q.shape[:2]
    if d_out.stride(-1) != 1:
        d_out = d_out.contiguous()
    d_q, d_k, d_v = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, call.k, call.v)
    )
    row_sums = torch.empty((heads, 2, rows), dtype=torch.float32, device=q.device)
    d_bias = None
    if bias_gradient:
        assert call.bias is not None
        batch, _, *size = call.bias.values.shape
        d_bias = torch.zeros((batch, heads, *size), dtype=torch.float32, device=q.device)
    if rows and call.k.shape[0] and seqs.q_len.shape[0]:
        launches = _Launches(call, d_out, row_sums)
        with launching(call):
            d_lse = None if d_lse is None else d_lse.contiguous()
            launches.prepare(out, lse.contiguous(), d_lse, d_q)
            for part in _parts(call, tiles, decode_tiles):
                launches.queries(part, d_q, d_bias)
                launches.keys(part, d_k, d_v)
            clear_unowned(d_k, seqs.k_start, seqs.k_len, y=d_v)
    else:
        for x in (d_q, d_k, d_v):
            x.zero_()
        row_sums[:, 0], row_sums[:, 1] = torch.inf, 0.0
    d_sinks = None
    if call.sinks is not None:
        row_lse, delta = row_sums.unbind(1)  # [Hq, Tq]
        weight = torch.exp2(call.sinks.float()[:, None] * LOG2_E - row_lse)
        d_sinks = -(weight * delta).sum(1).to(call.sinks.dtype)
    if d_bias is not None:
        assert call.bias is not None
        if call.bias.values.shape[1] == 1:
            d_bias = d_bias.sum(1, keepdim=True)
        d_bias = d_bias.to(call.bias.values.dtype)
    return d_q, d_k, d_v, d_sinks, d_bias


def _super_blocks_of_keys(call: Call) -> int:
    batch = call.seqs.k_len.shape[0]
    return min(call.k.shape[0] // SUPER_ROWS + batch, batch * -(-call.seqs.max_k // SUPER_ROWS))


def _parts(call: Call, tiles: TileMap | None, decode_tiles: TileMap | None) -> list[Part]:
    skip, skip_decode, nm = call.plan.skip, call.plan.skip_decode, call.plan.nm
    exact = skip is not None and skip.exact_normalizer
    exact_decode = skip_decode is not None and skip_decode.exact_normalizer
    if call.phase is None and call.seqs.max_q > 1:
        if nm is None and tiles is None and decode_tiles is None:
            return [Part()]
        prefill = Part(Phase.PREFILL, nm, tiles, exact)
        decode = Part(Phase.DECODE, None, decode_tiles, exact_decode)
        return [prefill] if call.seqs.min_q > 1 else [prefill, decode]
    if call.phase is Phase.PREFILL:
        return [Part(None, nm, tiles, exact)]
    return [Part(None, None, decode_tiles, exact_decode)]


@dataclass(frozen=True, eq=False)
class _Launches:
    """What the launches of a backward pass share.

    Args:
        row_sums: [Hq, 2, Tq] fp32, see `prepare_kernel`.
    """

    call: Call
    d_out: Tensor
    row_sums: Tensor

    def prepare(self, out: Tensor, lse: Tensor, d_lse: Tensor | None, d_q: Tensor) -> None:
        """Fills in what each row adds to the gradients of its scores. Clears `d_q` where it sees none."""
        rows, heads = self.call.q.shape[:2]
        strides = (arguments.strides(x) for x in (out, self.d_out, d_q))
        C = self._variant(Launch(64, 64, 4, 1), Part(), False)
        prepare_kernel[(-(-rows // 64), heads)](
            out, lse, self.d_out, d_lse, self.row_sums, d_q, *strides, rows, heads, C, num_warps=4
        )

    def queries(self, part: Part, d_q: Tensor, d_bias: Tensor | None) -> None:
        """Writes the gradients of the query rows of some sequences."""
        run = partial(self._queries_as, part, d_q, d_bias)
        launch_first_that_fits(thriftier(self._best(part)[0]), run)

    def _queries_as(self, part: Part, d_q: Tensor, d_bias: Tensor | None, launch: Launch) -> None:
        call, q = self.call, self.call.q
        rows, heads = q.shape[:2]
        # With N:M, keys are loaded in another order than they lie in.
        (k_boxes, v_boxes), (box_rows, _), box_columns = boxes(
            (call.k, call.v), launch.block_n, is_wanted=part.nm is None
        )
        C = self._variant(launch, part, k_boxes is not None, BIAS_GRADIENT=d_bias is not None)
        super_blocks = slot_count(rows, call.seqs.q_len.shape[0], call.seqs.max_q, SUPER_ROWS)
        words, n_words = _words(part)
        lists = NO_LISTS
        if C.GIVEN:
            assert words is not None
            lists = row_lists(words, super_blocks * (SUPER_ROWS // C.LIST_ROWS), C.GROUPS)
        tensors = (q, call.k, call.v, self.d_out, d_q)
        query_gradient_kernel[(super_blocks * (SUPER_ROWS // C.BLOCK_M) * heads,)](
            *tensors[:4], self.row_sums, d_q, k_boxes, v_boxes, box_rows, *box_columns,
            *(arguments.strides(x) for x in tensors),
            *arguments.sequences(call.seqs), super_blocks, heads, heads // call.k.shape[1], rows,
            call.bounds, arguments.window(call.window),
            *arguments.grid(call.mask, call.seqs), *arguments.grid(call.bias, call.seqs),
            d_bias, *((0, 0, 0, 0) if d_bias is None else d_bias.stride()),
            call.scale, call.softcap or 0.0, *arguments.shields(part.nm),
            words, n_words, *lists, n_words * WORD_BITS,
            C, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    def keys(self, part: Part, d_k: Tensor, d_v: Tensor) -> None:
        """Writes the gradients of the keys and values of some sequences."""
        run = partial(self._keys_as, part, d_k, d_v)
        launch_first_that_fits(thriftier(self._best(part)[1]), run)

    def _keys_as(self, part: Part, d_k: Tensor, d_v: Tensor, launch: Launch) -> None:
        call, q, k, seqs = self.call, self.call.q, self.call.k, self.call.seqs
        (rows, heads), kv_heads, batch = q.shape[:2], k.shape[1], seqs.q_len.shape[0]
        super_blocks = _super_blocks_of_keys(call)
        if not super_blocks:
            return
        columns = super_blocks * (SUPER_ROWS // launch.block_n) * kv_heads
        (q_boxes, d_out_boxes), (box_rows, _), box_columns = boxes((q, self.d_out), launch.block_m)
        C = self._variant(launch, part, q_boxes is not None, MEMBERS=heads // kv_heads)
        words, n_words = _words(part)
        n_blocks = (-(-seqs.max_q // SUPER_ROWS) + 1) * (SUPER_ROWS // C.BLOCK_M)
        lists, length = NO_LISTS, 0
        if C.LISTED:
            n_lists, members = (kv_heads, C.MEMBERS) if C.GIVEN else (1, 1)
            lists = empty_lists((columns // kv_heads, n_lists), n_blocks, members, (2,), q.device)
            length = n_blocks * members
            column_lists_kernel[(super_blocks, n_lists)](
                words, n_words, *lists, length, seqs.q_start, seqs.q_len, seqs.k_len, batch, heads, members,
                call.bounds, arguments.window(call.window), *arguments.shields(part.nm), C, num_warps=4,
            )  # fmt: skip
        n_programs = SHARES * processors(q.device)
        slots = shares_of = None
        if C.GIVEN:
            # Only the device knows how long lists are.
            shares, n_slots = 1, 2 * n_programs
            slots = torch.empty((n_slots, 3), dtype=torch.int32, device=q.device)
            shares_of = torch.empty(columns, dtype=torch.int32, device=q.device)
            shares_kernel[(1,)](
                lists[2], columns, n_programs, LEAST_VISITS, slots, n_slots, shares_of, num_warps=4
            )
        else:
            most = -(-n_blocks * C.MEMBERS // LEAST_VISITS)
            shares = max(1, min(most, n_programs // columns))
            n_slots = columns * shares if shares > 1 else 0
        sums = [
            torch.empty((n_slots, C.BLOCK_N, dim), dtype=torch.float32, device=q.device)
            for dim in (C.BLOCK_D, C.BLOCK_DV)
        ]
        tensors = (q, k, call.v, self.d_out, d_k, d_v)
        n_launched = n_slots + columns if C.GIVEN else columns * shares
        key_gradient_kernel[(n_launched,)](
            *tensors[:4], self.row_sums, d_k, d_v, shares, slots, n_slots, shares_of, *sums,
            q_boxes, d_out_boxes, box_rows, *box_columns,
            *(arguments.strides(x) for x in tensors),
            *arguments.sequences(seqs), super_blocks, heads, heads // kv_heads, rows,
            call.bounds, arguments.window(call.window),
            *arguments.grid(call.mask, seqs), *arguments.grid(call.bias, seqs),
            call.scale, call.softcap or 0.0, *arguments.shields(part.nm),
            words, n_words, *lists, length,
            C, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
        if n_slots:
            add_shares_kernel[(n_slots // shares,)](
                *sums, shares, slots, d_k, d_v, arguments.strides(d_k), arguments.strides(d_v),
                seqs.q_len, seqs.k_start, seqs.k_len, batch, kv_heads, C, num_warps=8,
            )  # fmt: skip

    def _best(self, part: Part) -> tuple[Launch, Launch]:
        of_words = 4 if part.tiles is not None and part.decision is None else 0
        return backward_launch(
            (self.call.q.shape[-1], self.call.v.shape[-1]),
            self.call.q.element_size(),
            part.nm is not None,
            part.decision,
            arguments.grid_bytes(self.call) + of_words,
            shared_memory(self.call.q.device),
        )

    def _variant(self, launch: Launch, part: Part, has_boxes: bool, **more: Any) -> BackwardVariant:
        call, nm, tiles = self.call, part.nm, part.tiles
        return BackwardVariant(
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            STAGES=launch.stages,
            HAS_LOWER_EDGE=call.bounds is not None or call.window is not None,
            BOXES=has_boxes,
            N=nm.n if nm else 0,
            M=nm.m if nm else 4,
            GIVEN=part.decision is not None,
            GROUPS=max(1, launch.block_m // part.decision[0]) if part.decision else 1,
            EXACT=part.exact and tiles is not None,
            ONLY_PREFILL=part.phase is Phase.PREFILL,
            ONLY_DECODE=part.phase is Phase.DECODE,
            TILE_ROWS=(tiles and tiles.block_rows) or 0,
            TILE_KEYS=tiles.block_keys if tiles else 0,
            BITS=tiles is not None and part.decision is None,
            AHEAD=self.call.q.element_size() == 2 and launch.block_n <= 64,
            **more,
            **arguments.features(call),
        )


def _words(part: Part) -> tuple[Tensor | None, int]:
    if part.tiles is None:
        return None, 0
    return part.tiles.words.contiguous(), part.tiles.words.shape[2]

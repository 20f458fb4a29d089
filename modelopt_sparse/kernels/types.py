"""What the kernel functions take and return: frozen dataclasses of numbers and tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from modelopt_sparse.errors import ArgumentError, ArgumentTypeError, describe

from .scale_factors import ScaleFactors
from .tiles import packed_bits, row_tile_spans, slot_count, unpacked_bits, word_count


class Phase(Enum):
    """Which rule a sequence follows. One query row decodes, more prefill, unless the caller says."""

    PREFILL = "prefill"
    DECODE = "decode"

    @classmethod
    def of(cls, n_q: int, given: Phase | None = None) -> Phase:
        """The phase of a sequence of `n_q` query rows, where the caller says `given`."""
        return given or (cls.DECODE if n_q == 1 else cls.PREFILL)


@dataclass(frozen=True, eq=False)
class Seqs:
    """Where each sequence's query rows and keys lie in the packed tensors.

    Sequence ``b`` owns rows ``q_start[b] : q_start[b] + q_len[b]`` of ``q`` and keys
    ``k_start[b] : k_start[b] + k_len[b]`` of ``k`` and ``v``. Rows that no sequence owns come back as 0.

    Args:
        q_start, q_len, k_start, k_len: int32 [B], on the device of ``q``.
        max_q, max_k: upper bounds of the lengths, in tokens; host ints.
        min_q: lower bound of those q_len that aren't 0; a host int. From 2 on, nothing is launched for
            sequences of one row.

    Sequences may share keys, but not rows; keys that they share have no gradients. On a GPU nothing of this
    is checked, and what comes back of lengths outside of the bounds is undefined.
    """

    q_start: Tensor
    q_len: Tensor
    k_start: Tensor
    k_len: Tensor
    max_q: int
    max_k: int
    min_q: int = 0

    @classmethod
    def from_lengths(
        cls,
        q_lens: Sequence[int],
        k_lens: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> Seqs:
        """Sequences laid end to end. ``k_lens`` defaults to ``q_lens``.

        Raises:
            ArgumentTypeError: a length is not an int.
        """
        k_lens = q_lens if k_lens is None else k_lens
        for name, lens in (("q_lens", q_lens), ("k_lens", k_lens)):
            if any(type(length) is not int for length in lens):
                raise ArgumentTypeError(describe(name, repr(lens), "ints"))

        def starts(lens: Sequence[int]) -> list[int]:
            return [sum(lens[:i]) for i in range(len(lens))]

        def column(values: Sequence[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.int32, device=device)

        return cls(
            column(starts(q_lens)),
            column(q_lens),
            column(starts(k_lens)),
            column(k_lens),
            max(q_lens, default=0),
            max(k_lens, default=0),
            min(filter(None, q_lens), default=0),
        )

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_q: Tensor,
        max_q: int,
        cu_k: Tensor | None = None,
        max_k: int | None = None,
        min_q: int = 0,
    ) -> Seqs:
        """Sequences laid end to end, from cumulative lengths int32 [B + 1].

        Raises:
            ArgumentError: they are no such tensors.
        """
        cu_k = cu_q if cu_k is None else cu_k
        for name, cu in (("cu_q", cu_q), ("cu_k", cu_k)):
            if (
                not isinstance(cu, Tensor)
                or cu.ndim != 1
                or len(cu) == 0
                or cu.dtype != torch.int32
            ):
                got = f"{cu.dtype} {tuple(cu.shape)}" if isinstance(cu, Tensor) else repr(cu)
                raise ArgumentError(describe(name, got, "int32 [sequences + 1]"))
        return cls(
            cu_q[:-1].int(),
            cu_q.diff().int(),
            cu_k[:-1].int(),
            cu_k.diff().int(),
            max_q,
            max_q if max_k is None else max_k,
            min_q,
        )


@dataclass(frozen=True, eq=False)
class ScoreGrid:
    """One value for each (sequence, head, query row, key): a boolean mask or an additive bias.

    Args:
        values: [B, 1 or Hq, rows, keys], any strides.
        row_start, key_start: int32 [B]; row ``i`` and key ``j`` of sequence ``b`` have the value
            ``values[b, h, row_start[b] + i, key_start[b] + j]``. None means 0.
    """

    values: Tensor
    row_start: Tensor | None = None
    key_start: Tensor | None = None


@dataclass(frozen=True)
class NMSparsity:
    """N:M sparse softmax, in prefill: of every ``m`` consecutive keys the ``n`` largest scores stay.

    Args:
        n, m: m is 4 or 8, 1 <= n <= m; n == m is dense.
        num_sink_tokens: keys ``j < num_sink_tokens`` always stay.
        dense_window_size: keys with ``0 <= p - j < dense_window_size`` always stay.
    """

    n: int = 2
    m: int = 4
    num_sink_tokens: int = 0
    dense_window_size: int = 64


@dataclass(frozen=True, eq=False)
class SkipSoftmax:
    """Skip-softmax (BLASST, arXiv 2512.12087) for sequences that prefill.

    Args:
        threshold: lambda, a fraction. None or 0 is dense (and only counts, if count_thresholds or a
            histogram are asked for), unless there is a scale factor; a float in (0, 1]; or a float32 tensor
            that broadcasts to [B, Hq].
        block_rows, block_keys: the decision tile, anchored at position 0. Part of the result.
        count_thresholds: further lambdas whose skipped tiles are counted, without being applied.
        exact_normalizer: keep summing the exponentials of skipped tiles, so that lse is the dense one.
            Their scores then have a gradient too, through the sum.
        min_context: sequences of fewer keys keep every tile. A call without a longer one is dense: nothing
            is decided or counted.
        histogram: count the tiles by the lambda at which they fall too: `TileCounts.histogram`.
        scale_factor: in place of a threshold: lambda is this over the sequence's own number of keys, at
            most 1. A longer sequence has more tiles that matter little. A number, or `ScaleFactors`, by
            length and head.
    """

    threshold: float | Tensor | None
    block_rows: int = 64
    block_keys: int = 128
    count_thresholds: tuple[float, ...] = ()
    exact_normalizer: bool = False
    min_context: int = 0
    histogram: bool = False
    scale_factor: float | ScaleFactors | None = None


@dataclass(frozen=True, eq=False)
class SkipSoftmaxDecode:
    """Skip-softmax for sequences that decode: fixed segments of keys, each seeded by the last and first tile.

    Args:
        threshold, count_thresholds, exact_normalizer, min_context, histogram, scale_factor: as for
            `SkipSoftmax`.
        block_keys: keys of a decision tile. segment_keys: keys of a segment, a multiple of ``block_keys``.
        vote_heads: query heads that vote together, with all their rows; a divisor of those that share a KV
            head. None: all of these. Fewer skip more, and each vote reads the keys for itself.
    """

    threshold: float | Tensor | None
    block_keys: int = 64
    segment_keys: int = 4096
    vote_heads: int | None = None
    count_thresholds: tuple[float, ...] = ()
    exact_normalizer: bool = False
    min_context: int = 0
    histogram: bool = False
    scale_factor: float | ScaleFactors | None = None


@dataclass(frozen=True, eq=False)
class TileMap:
    """Decision tiles of one phase of a call, one bit each: which were computed, or are to be.

    Args:
        words: int32 [slots, Hq, words], see `kernels.tiles`: tile (row tile in slot s, key tile c) of head h
            is bit ``c % 32`` of ``words[s, h, c // 32]``. Bits of tiles that don't exist are 0.
        seqs, causal, phase: those of the call.
        block_rows: rows of a tile, anchored at position 0, of sequences that prefill. None: the map is of
            sequences that decode, all rows of each are one row tile, and its slot is the sequence's index.
        block_keys: keys of a tile.
    """

    words: Tensor
    seqs: Seqs
    causal: bool
    block_rows: int | None
    block_keys: int
    phase: Phase | None = None

    @classmethod
    def from_kept(
        cls,
        kept: Sequence[Tensor | None],
        seqs: Seqs,
        causal: bool,
        block_rows: int | None,
        block_keys: int,
        *,
        rows: int,
        heads: int,
        phase: Phase | None = None,
    ) -> TileMap:
        """The map that `unpacked` unpacks to `kept`. Reads the lengths on the host.

        Args:
            kept: for each sequence bool [Hq, row tiles, key tiles], row tile 0 that of its first row.
                None: no bits.
            rows: of ``q``, all sequences together. heads: Hq.
        Raises:
            ArgumentError: `kept` doesn't fit the sequences, or has tiles of one in the other phase.
        """
        batch = len(seqs.q_len)
        if len(kept) != batch:
            raise ArgumentError(describe("kept", f"{len(kept)} entries", f"{batch}, as seqs"))
        n_words = word_count(seqs.max_k, block_keys)
        shape = (slot_count(rows, batch, seqs.max_q, block_rows), heads, n_words)
        words = torch.zeros(shape, dtype=torch.int32, device=seqs.q_len.device)
        tile_map = cls(words, seqs, causal, block_rows, block_keys, phase)
        for b, (flags, place) in enumerate(zip(kept, tile_map._places(), strict=True)):
            if flags is None:
                continue
            if place is None:
                takes = "None for a sequence in the other phase"
                raise ArgumentError(describe(f"kept[{b}]", f"shape {tuple(flags.shape)}", takes))
            slots, key_tiles = place
            takes_shape = (heads, slots.stop - slots.start, key_tiles)
            if flags.dtype != torch.bool or flags.shape != takes_shape:
                got = f"{flags.dtype} {tuple(flags.shape)}"
                raise ArgumentError(describe(f"kept[{b}]", got, f"torch.bool {takes_shape}"))
            words[slots] = packed_bits(flags.to(words.device), n_words).transpose(0, 1)
        return tile_map

    def unpacked(self) -> tuple[Tensor | None, ...]:
        """For each sequence bool [Hq, row tiles, key tiles]; None for one in the other phase.

        Reads the lengths on the host.
        """
        return tuple(
            None if place is None else unpacked_bits(self.words[place[0]].transpose(0, 1), place[1])
            for place in self._places()
        )

    def _places(self) -> list[tuple[slice, int] | None]:
        """The slots and the number of key tiles of each sequence; None for one in the other phase."""
        seqs = self.seqs
        own = Phase.DECODE if self.block_rows is None else Phase.PREFILL
        first, count = row_tile_spans(seqs.q_len, seqs.k_len, self.causal, self.block_rows)
        columns = torch.stack([seqs.q_len.long(), seqs.k_len.long(), first, count], 1).tolist()
        return [
            (slice(slot, slot + n), -(-n_k // self.block_keys))
            if Phase.of(n_q, self.phase) is own
            else None
            for n_q, n_k, slot, n in columns
        ]


@dataclass(frozen=True, eq=False)
class Plan:
    """What is done to the scores of a call, by phase. `DENSE` does nothing.

    Args:
        nm: N:M sparsity, in prefill.
        skip, skip_decode: tiles to skip, in prefill and in decode.
        tiles: in place of `skip`, the only tiles that sequences in prefill compute; the map of an earlier
            call repeats it, up to the order of its sums. Nothing is decided or counted then. Bits of
            tiles in which no row sees a key don't matter.
    """

    nm: NMSparsity | None = None
    skip: SkipSoftmax | None = None
    skip_decode: SkipSoftmaxDecode | None = None
    tiles: TileMap | None = None

    def prepare(self, device: torch.device) -> None:
        """Makes what a first call on a device would make; see `ScaleFactors.prepare`."""
        for part in (self.skip, self.skip_decode):
            if part is not None and isinstance(part.scale_factor, ScaleFactors):
                part.scale_factor.prepare(device)


DENSE = Plan()


@dataclass(frozen=True, eq=False)
class TileCounts:
    """Decision tiles of one phase, summed over the sequences of a call. On the device of ``q``.

    Args:
        visible: int64 [Hq], tiles in which at least one row sees a key.
        skipped: int64 [1 + len(count_thresholds), Hq]; row 0 is the threshold in force.
        histogram: int64 [256, Hq], the visible tiles by the least lambda above which they are skipped,
            where that was asked for. Bin 0: kept at every lambda. Bin b: from 2^(-b / 8) to 2^(-(b - 1) / 8).
            The last bin: all below. Tiles of sequences below `min_context` too, as if there were none.
    """

    visible: Tensor
    skipped: Tensor
    histogram: Tensor | None = None

    def is_like(self, other: TileCounts) -> bool:
        """Whether both count the same: as many heads and thresholds, and a histogram or none."""
        has_histogram = self.histogram is not None
        same_shape = self.skipped.shape == other.skipped.shape
        return same_shape and has_histogram == (other.histogram is not None)

    def __add__(self, other: TileCounts) -> TileCounts:
        """The tiles of both, which are like each other."""
        histogram = None
        if self.histogram is not None and other.histogram is not None:
            histogram = self.histogram + other.histogram
        return TileCounts(self.visible + other.visible, self.skipped + other.skipped, histogram)

    def to(self, device: torch.device) -> TileCounts:
        """The same on a device."""
        histogram = None if self.histogram is None else self.histogram.to(device)
        return TileCounts(self.visible.to(device), self.skipped.to(device), histogram)


@dataclass(frozen=True, eq=False)
class AttentionOutput:
    """What a call computed.

    Args:
        out: [Tq, Hq, Dv] in the dtype of ``q``. 0 in rows that see no key.
        lse: [Tq, Hq] fp32 (fp64 for fp64 input), base 2, over the keys that stayed and the sink logit;
            -inf in rows that see no key.
        prefill, decode: tile counts of the sequences in that phase; None where no skipping is in force.
        tiles: only with ``details=True`` and skipping in force in prefill: the tiles that were visible and
            not skipped. With given tiles, those.
        decode_tiles: the same of sequences that decode.
        dropped_mass: only with ``details=True`` and skipping in force: [Tq, Hq], the share of the
            row's softmax weight (relative to what N:M left) that lay in skipped tiles. Where nothing is
            decided, also by given tiles, 0.
        dropped_mass_bound: with skipping in force: [Tq, Hq], at least `dropped_mass`, had without
            summing skipped tiles: B / (K + B), where K is the sum of the exponentials kept, with the sink
            logit's, and B takes each skipped tile for ``block_keys`` times the row's largest in it. 0
            where the row lost nothing.
    """

    out: Tensor
    lse: Tensor
    prefill: TileCounts | None = None
    decode: TileCounts | None = None
    tiles: TileMap | None = None
    decode_tiles: TileMap | None = None
    dropped_mass: Tensor | None = None
    dropped_mass_bound: Tensor | None = None

    @property
    def natural_lse(self) -> Tensor:
        """`lse` in natural-log units."""
        return self.lse * math.log(2)

    @property
    def kept(self) -> tuple[Tensor | None, ...] | None:
        """The tiles of `tiles` and `decode_tiles`; None without either. Reads the lengths on the host.

        For each sequence bool [Hq, row tiles, key tiles], True where a tile was visible and not skipped.
        The first row tile is that of the sequence's first row; a sequence that decodes has one. None
        for a sequence whose phase has no skipping.
        """
        maps = [part.unpacked() for part in (self.tiles, self.decode_tiles) if part is not None]
        if not maps:
            return None
        return tuple(
            next((tiles for tiles in of_phases if tiles is not None), None)
            for of_phases in zip(*maps, strict=True)
        )

"""What is measured on: plain random tensors, and tensors whose share of skippable tiles is dialled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from modelopt_sparse.errors import ArgumentError, describe
from modelopt_sparse.kernels import Seqs

ROWS, KEYS = 64, 128
"""The decision tile that `dialled` aims at: the default of `SkipSoftmax`."""
THRESHOLD = 0.1
"""The lambda at which a dialled share of tiles is skipped."""
SKIPS_NOTHING = 1e-30
"""A lambda under which no tile falls."""
LATENT, ROTARY = 512, 64
"""Channels of a latent and of its rotary part, as in DeepSeek-V3."""

# Log2 scores of the first key, and of keys whose topic a query asks for. Every other key scores about 0,
# with noise of about 0.6: cold tiles lie some fifteen deviations under the running max + log2(lambda).
SINK, TOPIC = 12.0, 10.0
QUERY_NOISE = 0.5
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Shape:
    """Heads and their size; values have `head_dim` too, unless `value_dim` says otherwise."""

    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    value_dim: int | None = None


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of a call, packed.

    Args:
        q: [T, Hq, D]; k: [T, Hk, D]; v: [T, Hk, Dv]; lengths: of the sequences, end to end.
        causal: each position sees those up to its own, else all of its sequence.
        share: the dialled share of skippable tiles; None if nothing was dialled.
        kept: bool [Hk, segments, segments], what should be kept of each (128 rows, 128 keys), the causal
            half; with ``share`` only.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: tuple[int, ...]
    causal: bool = True
    share: float | None = None
    kept: Tensor | None = None

    @property
    def seqs(self) -> Seqs:
        """The sequences, as a kernel call takes them."""
        return Seqs.from_lengths(self.lengths, device=self.q.device)

    @property
    def spans(self) -> list[slice]:
        """Where each sequence lies."""
        ends = list(accumulate(self.lengths))
        return [slice(end - n, end) for end, n in zip(ends, self.lengths, strict=True)]

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.q.shape[1] // self.k.shape[1]

    def flops(self) -> float:
        """Of one dense forward, multiplications and additions of the two products."""
        heads, dims = self.q.shape[1], self.q.shape[2] + self.v.shape[2]
        each_pair = 1.0 if self.causal else 2.0  # of positions; causal ones see half of them
        return sum(each_pair * n * n * dims * heads for n in self.lengths)


def plain(
    lengths: Sequence[int],
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    causal: bool = True,
) -> Inputs:
    """Standard normal q, k, v."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int, dim: int) -> Tensor:
        size = (sum(lengths), heads, dim)
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    q, k = normal(shape.q_heads, shape.head_dim), normal(shape.kv_heads, shape.head_dim)
    v = normal(shape.kv_heads, shape.value_dim or shape.head_dim)
    return Inputs(q, k, v, tuple(lengths), causal)


def dialled(
    length: int,
    share: float | Sequence[float],
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    has_hot_rows: bool = False,
) -> Inputs:
    """One sequence of which `share` of the visible tiles can be skipped at lambda = `THRESHOLD`.

    Keys are cut in segments of 128 positions, each about one topic; the first key is a sink that every
    query looks at. The queries of a segment ask for a set of topics, drawn for each KV head such that as
    many tiles stay cold as the dial says; query heads that share a KV head differ in their noise. The tiles
    on the diagonal and at the start are always kept.

    Args:
        share: of all heads, or of each KV head.
        has_hot_rows: the first row of each row tile asks for all topics, so that no tile can be skipped,
            though 63 rows of 64 need few.
    Raises:
        ArgumentError: the tiles that are always kept are too many for this share.
    """
    heads, dim = shape.kv_heads, shape.head_dim
    shares = list(share) if isinstance(share, Sequence) else [share] * heads
    segments = -(-length // KEYS)
    topics = min(64, dim // 2)
    generator = torch.Generator(device).manual_seed(seed)

    topic_of = torch.rand(heads, segments, generator=generator, device=device).argsort(-1) % topics
    asked = _asked_topics(length, shares, topic_of, topics, generator)  # [Hk, segments, topics]

    # Orthonormal directions: topics, the sink, and what is left over for noise.
    basis = torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator, device=device)).Q
    directions, sink, rest = basis.split([topics, 1, dim - topics - 1], dim=1)
    to_log2 = LOG2_E / math.sqrt(dim)
    size = math.sqrt(dim)  # of a key, so that its elements are of size 1
    per_direction = 1 / (size * to_log2)  # length of a query along one, for each unit of score

    position = torch.arange(length, device=device) // KEYS
    q = torch.empty(length, heads, shape.q_heads // heads, dim, dtype=dtype, device=device)
    k = torch.empty(length, heads, dim, dtype=dtype, device=device)
    v = torch.empty_like(k)
    values = torch.randn(heads, topics, dim, generator=generator, device=device)
    for head in range(heads):

        def noise(*rows: int, head: int = head) -> Tensor:
            size = (*rows, rest.shape[1])
            along: Tensor = torch.randn(size, generator=generator, device=device) @ rest[head]
            return along

        topic = topic_of[head, position]  # [n]
        keys = directions[head, topic] * size
        keys[0] = sink[head, 0] * size
        k[:, head] = keys + noise(length)
        asks = TOPIC * asked[head].float() @ directions[head] + SINK * sink[head]  # [segments, D]
        queries = (per_direction * asks)[position, None]
        if has_hot_rows:
            hot = TOPIC * directions[head].sum(0) + SINK * sink[head, 0]
            queries[::ROWS] = per_direction * hot
        q[:, head] = queries + QUERY_NOISE * noise(length, q.shape[2])
        v[:, head] = values[head, topic] + torch.randn(
            length, dim, generator=generator, device=device
        )

    index = torch.arange(segments, device=device)
    kept = asked.gather(-1, topic_of[:, None].expand(-1, segments, -1))  # [Hk, segments, segments]
    kept |= (index == 0) | (index == index[:, None]) | has_hot_rows
    kept &= index <= index[:, None]
    mean = 0.0 if has_hot_rows else sum(shares) / heads
    return Inputs(q.flatten(1, 2), k, v, (length,), share=mean, kept=kept)


def greatest_share(length: int) -> float:
    """The share of visible tiles that is neither on the diagonal nor at the start."""
    row_tiles, free = _row_tiles_and_free(length, torch.device("cpu"))
    visible = row_tiles * (torch.arange(len(free)) + 1)
    return float((row_tiles * free).sum() / visible.sum())


def _row_tiles_and_free(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each segment of rows: how many row tiles, and how many key tiles can be cold in each."""
    index = torch.arange(-(-length // KEYS), device=device)
    rows = (length - index * KEYS).clamp(max=KEYS)
    return -(-rows // ROWS), (index - 1).clamp(min=0)


def _asked_topics(
    length: int, shares: list[float], topic_of: Tensor, topics: int, generator: torch.Generator
) -> Tensor:
    """Which topics the queries of each segment ask for: bool [Hk, segments, topics].

    Topics are taken in random order until as many earlier segments are about one of them as should be hot.
    """
    most = greatest_share(length)
    if len(shares) != len(topic_of):
        takes = f"one number, or one for each of the {len(topic_of)} KV heads"
        raise ArgumentError(describe("share", shares, takes))
    for share in shares:
        if not 0 <= share <= most:
            takes = f"0 to {most:.3f} at {length} tokens"
            raise ArgumentError(describe("share", share, takes, "Give a longer sequence."))
    _, free = _row_tiles_and_free(length, topic_of.device)
    cold_shares = torch.tensor(shares, dtype=torch.float64, device=topic_of.device)[:, None]
    hot_share = 1 - cold_shares / most if most else 0 * cold_shares

    # Rounded so that the sum over segments is right; each head rounds elsewhere.
    sums = (hot_share * free.double()).cumsum(-1)
    phase = torch.rand(len(topic_of), 1, generator=generator, device=topic_of.device)
    wanted = torch.diff((sums + phase).floor(), prepend=torch.zeros_like(phase), dim=-1)

    of_segment = torch.nn.functional.one_hot(topic_of, topics)  # [Hk, segments, topics]
    of_segment[:, 0] = 0  # always kept
    counts = of_segment.cumsum(1) - of_segment  # of earlier segments
    order = torch.rand(counts.shape, generator=generator, device=topic_of.device).argsort(-1)
    ordered = counts.gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    # The last topic may be about more segments than are wanted: taken as often as makes the mean right.
    chance = torch.rand((*wanted.shape, 1), generator=generator, device=topic_of.device)
    taken = (before + chance * ordered <= wanted[..., None]) & (ordered > 0)
    return torch.zeros_like(taken).scatter_(-1, order, taken)

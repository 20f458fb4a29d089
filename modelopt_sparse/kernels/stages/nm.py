"""N:M sparse softmax: of every M consecutive keys the N largest scores stay.

The keys of a tile are loaded in an order that puts those of one place in their groups side by side:
column ``place * (BLOCK_N / M) + group``. So a group's scores lie in one thread, and halving the columns
again and again gives M tensors whose elements of one index are a group.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nm_select(scores, N: tl.constexpr, M: tl.constexpr):
    """The scores that are among the N largest of their group, -inf for others.

    Of equal scores the lower key's wins.

    Args:
        scores: [BLOCK_M, BLOCK_N], columns by place, -inf where a key is hidden.
    """
    if M == 4:
        a, b, c, d = _quarters(scores)
        ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
        return _joined(
            _if(_stays_of_4(ab, ac, ad, N), a),
            _if(_stays_of_4(ab == 0, bc, bd, N), b),
            _if(_stays_of_4(ac == 0, bc == 0, cd, N), c),
            _if(_stays_of_4(ad == 0, bd == 0, cd == 0, N), d),
        )
    left, right = _halves(scores)
    a, b, c, d = _quarters(left)
    e, f, g, h = _quarters(right)
    places = (a, b, c, d, e, f, g, h)
    rivals = _rivals_of_8(places)
    return _halves_joined(
        _joined(
            _of_8(places, rivals, 0, N),
            _of_8(places, rivals, 1, N),
            _of_8(places, rivals, 2, N),
            _of_8(places, rivals, 3, N),
        ),
        _joined(
            _of_8(places, rivals, 4, N),
            _of_8(places, rivals, 5, N),
            _of_8(places, rivals, 6, N),
            _of_8(places, rivals, 7, N),
        ),
    )


@triton.jit
def _rivals_of_8(places):
    """How many of its group win against each score, in four bits for each place."""
    rivals = tl.zeros_like(places[0]).to(tl.int32)
    for lower in tl.static_range(8):
        for higher in tl.static_range(lower + 1, 8):
            wins = places[lower] >= places[higher]
            rivals += tl.where(wins, 1 << (4 * higher), 1 << (4 * lower))
    return rivals


@triton.jit
def _of_8(places, rivals, mine: tl.constexpr, N: tl.constexpr):
    """The score at one of 8 places, -inf if N others of its group win against it."""
    return _if(((rivals >> (4 * mine)) & 15) < N, places[mine])


@triton.jit
def _if(stays, scores):
    return tl.where(stays, scores, float("-inf"))


@triton.jit
def nm_shielded(position, keys, num_sink_tokens, dense_window_size):
    """Keys that stay regardless: bool [BLOCK_M, keys]."""
    distance = position[:, None] - keys[None, :]
    near = (distance >= 0) & (distance < dense_window_size)
    return near | (keys < num_sink_tokens)[None, :]


@triton.jit
def _stays_of_4(x, y, z, N: tl.constexpr):
    """Whether a score that wins against the others of its group as x, y, z say is among the N largest."""
    if N == 1:
        return x & y & z
    if N == 2:
        return (x & y) | (x & z) | (y & z)
    return x | y | z


@triton.jit
def _halves(x):
    """The left and the right half of the columns."""
    columns: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, columns]), [0, 2, 1]))


@triton.jit
def _quarters(x):
    left, right = _halves(x)
    a, b = _halves(left)
    c, d = _halves(right)
    return a, b, c, d


@triton.jit
def _halves_joined(left, right):
    return tl.reshape(
        tl.permute(tl.join(left, right), [0, 2, 1]), [left.shape[0], left.shape[1] * 2]
    )


@triton.jit
def _joined(a, b, c, d):
    return _halves_joined(_halves_joined(a, b), _halves_joined(c, d))

"""The share of tiles that may be skipped while outputs stay as near to the dense ones as is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from modelopt_sparse.kernels.types import Phase

from .budget import PROBES
from .curve import Curve
from .fit import TARGETS
from .recorder import Tallies, Tally, by_length


def share_within(modules: Sequence[Tallies], phase: Phase, error: float) -> float:
    """The largest share that modules may skip by one lambda at each length.

    Args:
        modules: what was counted of each, with errors.
        error: their outputs' relative error, root mean square over modules, stays within it at each length.
    Returns:
        The share: at most the largest of `TARGETS`, 0 where even the least probe errs more.
    """
    lengths = [by_length(own, phase) for own in modules]
    common = set.intersection(*map(set, lengths)) if lengths else set()
    shares = [_share_at([own[length] for own in lengths], error) for length in common]
    return min(shares, default=TARGETS[-1])


def _share_at(tallies: Sequence[Tally], error: float) -> float:
    squares = [
        float(np.mean([float(own.errors[1 + i].sum() / own.errors[0].sum()) for own in tallies]))
        for i in range(len(PROBES))
    ]
    curve = Curve.of([own.histogram for own in tallies])
    if squares[0] <= error**2:
        return TARGETS[-1]  # not even lambda 1 errs more
    inside = next((i for i, square in enumerate(squares) if square <= error**2), None)
    if inside is None:
        return 0.0
    # Between two probes the logarithm of the error is linear in that of lambda.
    logs = [math.log(max(squares[i], 1e-30)) for i in (inside, inside - 1)]
    lambdas = [math.log(PROBES[i]) for i in (inside, inside - 1)]
    threshold = math.exp(np.interp(2 * math.log(error), logs, lambdas))
    return min(curve.share(threshold), TARGETS[-1])

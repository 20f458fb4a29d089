"""How far a sparse attention output is from the dense one, row by row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modelopt_sparse.kernels.types import AttentionOutput


class Differences(NamedTuple):
    """Of each query row and head, float64 [Tq, Hq]; 0 in rows that see no key.

    Args:
        sees: 1 where the row sees a key.
        squared_error: squared norm of (sparse - dense) output.
        squared_norm: that of the dense output.
        dropped_mass: share of the row's softmax weight in skipped tiles, of what N:M left; 0 where the sparse
            output doesn't say it, as where nothing is skipped.
        dropped_mass_bound: the bound that kernels have of it for free, likewise.
    """

    sees: Tensor
    squared_error: Tensor
    squared_norm: Tensor
    dropped_mass: Tensor
    dropped_mass_bound: Tensor


def differences(dense: AttentionOutput, sparse: AttentionOutput) -> Differences:
    """What two outputs of the same call differ in."""
    wanted = dense.out.to(torch.promote_types(dense.out.dtype, torch.float32))
    none = torch.zeros_like(dense.lse)
    numbers = (
        dense.lse.isfinite(),
        (sparse.out - wanted).square().sum(-1),
        wanted.square().sum(-1),
        none if sparse.dropped_mass is None else sparse.dropped_mass,
        none if sparse.dropped_mass_bound is None else sparse.dropped_mass_bound,
    )
    return Differences(*(x.double() for x in numbers))

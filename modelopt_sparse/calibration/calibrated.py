"""What of a model is calibrated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from modelopt_sparse.methods.calibrated import (
    PHASES,
    CalibratedThreshold,
    PhaseName,
    SkipSoftmaxConfig,
)
from modelopt_sparse.module import SparseAttentionModule
from modelopt_sparse.module_state import sparse_modules


class Calibrated(NamedTuple):
    """A phase of a sparse module, called `name`, that has a calibrated threshold."""

    phase: PhaseName
    name: str
    module: SparseAttentionModule
    threshold: CalibratedThreshold


def calibrated_phases(model: nn.Module) -> Iterator[Calibrated]:
    """All of them, prefill first. Disabled modules and shares of 0 are among them."""
    for phase in PHASES:
        for name, module in sparse_modules(model):
            config = module.method.config
            if isinstance(config, SkipSoftmaxConfig):
                threshold = config.threshold(phase)
                if isinstance(threshold, CalibratedThreshold):
                    yield Calibrated(phase, name, module, threshold)

"""What a case is: a trial that is built for a setting, run, checked, and timed beside peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .baselines import Peer
from .inputs import Shape
from .timing import Run

OWN_DENSE, CUDNN, FLASH, SDPA = "own dense", "cuDNN", "FlashAttention-2", "SDPA"
"""Peers that several kinds of cases have."""


@dataclass(frozen=True)
class Setting:
    """On what the cases run."""

    device: torch.device
    dtype: torch.dtype
    shape: Shape = field(default_factory=Shape)


@dataclass(frozen=True)
class Check:
    """What the check found: the relative error, the bound that it stays under, and anything else wrong."""

    error: float
    bound: float
    wrong: str = ""

    @property
    def passed(self) -> bool:
        """Written so that NaN fails."""
        return self.error <= self.bound and not self.wrong


@dataclass(frozen=True, eq=False)
class Trial:
    """A case, ready to be run.

    Args:
        error: of a dense output, our own or a peer's.
        run: our call, to be timed.
        check: runs it once and compares.
        peers: by name, makers of what is timed in turn with ours.
        flops: of the dense call that does the same.
        sparsity: share of tiles skipped, as the kernel counts; set where something is skipped.
        length: tokens of the one sequence that prefills; None elsewhere, and where heads are of other dims.
    """

    error: Callable[[Tensor], float]
    run: Run
    check: Callable[[], Check]
    peers: Mapping[str, Callable[[], Peer]]
    flops: float
    sparsity: float | None = None
    length: int | None = None


@dataclass(frozen=True)
class Case:
    """A named case of a group, `build` makes it for a setting."""

    group: str
    name: str
    build: Callable[[Setting], Trial] = field(compare=False)


def tokens(n: int) -> str:
    """A length as names of cases spell it."""
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)

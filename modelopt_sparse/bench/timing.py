"""Times of several functions, taken in turn so that a warm or throttled chip is the same for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Run = Callable[[], object]

# Written before every timed call: more than any L2 holds.
FLUSH_BYTES = 2**28
# Writes before the first timed call, for each call to come: some 0.25 ms, about what a launch costs the host.
HEAD_START = 4
MOST_HEAD_START = 400


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds for all functions together, and bounds on the repetitions.

    Args:
        patience: seconds into which the least shall fit; where it doesn't, what does, and at least 3.
    """

    seconds: float = 1.5
    least: int = 10
    most: int = 100
    patience: float = 20.0


QUICK = Effort(0.25, 3, 25)
FEWEST = 3
FULL = Effort()


@dataclass(frozen=True)
class Times:
    """Milliseconds of one function: median, 20th and 80th percentile, of so many calls."""

    median: float
    p20: float
    p80: float
    calls: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Times:
        """From single measurements."""
        shares = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        values = torch.tensor(list(milliseconds), dtype=torch.float64).quantile(shares)
        median, p20, p80 = values.tolist()
        return cls(median, p20, p80, len(milliseconds))


def times_in_turn(runs: Sequence[Run], device: torch.device, effort: Effort) -> list[Times]:
    """Calls each function in turn, again and again, and times every call alone."""
    one_round = _cuda_rounds if device.type == "cuda" else _cpu_rounds
    one_round(runs, device, 1)  # warm: compiles, tunes, allocates
    seconds = sum(map(sum, one_round(runs, device, 1))) / 1000
    return [Times.of(measured) for measured in one_round(runs, device, rounds_of(effort, seconds))]


def rounds_of(effort: Effort, seconds: float) -> int:
    """Repetitions, where one of all functions takes so long."""
    seconds = max(seconds, 1e-6)
    least = min(effort.least, max(FEWEST, int(effort.patience / seconds)))
    return max(least, min(effort.most, int(effort.seconds / seconds)))


def _cpu_rounds(runs: Sequence[Run], device: torch.device, rounds: int) -> list[list[float]]:
    measured: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, mine in zip(runs, measured, strict=True):
            start = time.perf_counter()
            run()
            mine.append(1000 * (time.perf_counter() - start))
    return measured


def _event() -> torch.cuda.Event:
    # It ships no types.
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _cuda_rounds(runs: Sequence[Run], device: torch.device, rounds: int) -> list[list[float]]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
    torch.cuda.synchronize(device)
    # The GPU is kept busy first: unless the host stays ahead, what a launch costs it is measured too.
    for _ in range(min(MOST_HEAD_START, HEAD_START * rounds * len(runs))):
        flush.zero_()
    for _ in range(rounds):
        for run, mine in zip(runs, events, strict=True):
            flush.zero_()
            start, end = _event(), _event()
            start.record()
            run()
            end.record()
            mine.append((start, end))
    torch.cuda.synchronize(device)
    return [[start.elapsed_time(end) for start, end in mine] for mine in events]

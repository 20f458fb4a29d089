"""Runs a case: builds it, checks it, and only then times it in turn with its peers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .baselines import Peer, Unavailable
from .case import OWN_DENSE, Case, Setting, Trial
from .timing import Effort, Run, Times, times_in_turn

PEER_ERROR = 0.02
"""Error above which a peer's result isn't the same function as ours."""


@dataclass(frozen=True)
class Row:
    """One comparison.

    Args:
        ratio: their median over ours; above 1 we are faster. None if there is no timing; `note` says why.
        error: relative L2 error of our result. sparsity: share of tiles skipped, as counted.
        teraflops: ours, of the dense call that does the same. seconds: of the whole case.
        length: as in `Trial`. is_rival: as in `Peer`.
    """

    group: str
    case: str
    peer: str
    ratio: float | None = None
    ours: Times | None = None
    theirs: Times | None = None
    teraflops: float | None = None
    sparsity: float | None = None
    error: float | None = None
    note: str = ""
    failed: bool = False
    seconds: float = 0.0
    length: int | None = None
    is_rival: bool = False


def measure(case: Case, setting: Setting, effort: Effort) -> list[Row]:
    """The rows of a case. Whatever goes wrong becomes a row, so that the cases after it still run."""
    start = time.perf_counter()
    try:
        trial = case.build(setting)
        check = trial.check()
    except Exception as error:  # any failure of the case is what its row is to say
        return [_failure(case, f"{type(error).__name__}: {error}")]
    if not check.passed:
        wrong = check.wrong or f"error {check.error:.4f} is above {check.bound}"
        return [_failure(case, wrong, check.error, trial.sparsity)]

    rows, ready = [], []
    for name, peer in _peers(trial):
        if isinstance(peer, Peer):
            ready.append((name, peer))
        else:
            rows.append(Row(case.group, case.name, name, error=check.error, note=f"n/a: {peer}"))
    runs: list[Run] = [trial.run, *(peer.run for _, peer in ready)]
    try:
        ours, *others = times_in_turn(runs, setting.device, effort)
    except Exception as error:  # as above
        return [_failure(case, f"{type(error).__name__}: {error}", check.error, trial.sparsity)]
    seconds = time.perf_counter() - start
    for (name, peer), theirs in zip(ready, others, strict=True):
        rows.append(
            Row(
                case.group,
                case.name,
                name,
                ratio=theirs.median / ours.median,
                ours=ours,
                theirs=theirs,
                teraflops=trial.flops / ours.median / 1e9,
                sparsity=trial.sparsity,
                error=check.error,
                note=peer.note if peer.compare is None else peer.compare(ours, theirs),
                seconds=seconds,
                length=trial.length,
                is_rival=peer.is_rival,
            )
        )
    return rows


def fastest_rivals(rows: Sequence[Row]) -> dict[str, Row]:
    """Of each case the row of the fastest of others' kernels."""
    found: dict[str, Row] = {}
    least: dict[str, float] = {}
    for row in rows:
        if row.is_rival and row.ratio is not None and row.ratio < least.get(row.case, math.inf):
            least[row.case], found[row.case] = row.ratio, row
    return found


def _failure(
    case: Case, why: str, error: float | None = None, sparsity: float | None = None
) -> Row:
    first_line = (why.strip().splitlines() or [""])[0]
    return Row(
        case.group,
        case.name,
        "",
        error=error,
        sparsity=sparsity,
        note=f"FAILED: {first_line}",
        failed=True,
    )


def _peers(trial: Trial) -> Iterator[tuple[str, Peer | str]]:
    """Each peer, or why it can't be compared with."""
    for name, make in trial.peers.items():
        try:
            peer = make()
        except Unavailable as error:
            yield name, str(error)
            continue
        except torch.OutOfMemoryError:
            yield name, "the device has not the memory for it"
            continue
        if peer.output is not None:
            off = trial.error(peer.output())
            if not off <= PEER_ERROR:
                blame = "our dense result" if name == OWN_DENSE else "its result"
                yield name, f"{blame} is off by {off:.3f}"
                continue
        yield name, peer

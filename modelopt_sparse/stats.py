"""Tiles visited and skipped by one module, by phase. Accumulated on the tensors' device, without a sync."""

from __future__ import annotations

from dataclasses import dataclass, field

from modelopt_sparse.kernels.types import AttentionOutput, TileCounts


@dataclass
class PhaseStats:
    """Counts of one phase since the last reset; None until a call in that phase was counted."""

    calls: int = 0
    counts: TileCounts | None = None

    def add(self, counts: TileCounts) -> None:
        """Adds one call's counts. A change of what is counted, or of the head count, starts over."""
        old = self.counts
        if old is not None and old.is_like(counts):
            counts = old.to(counts.visible.device) + counts
        else:
            self.calls = 0
        self.calls += 1
        self.counts = counts


@dataclass
class AttentionStats:
    """What one sparse attention module did since the last reset."""

    prefill: PhaseStats = field(default_factory=PhaseStats)
    decode: PhaseStats = field(default_factory=PhaseStats)

    def record(self, output: AttentionOutput) -> None:
        """Adds one kernel call's tile counts."""
        if output.prefill is not None:
            self.prefill.add(output.prefill)
        if output.decode is not None:
            self.decode.add(output.decode)

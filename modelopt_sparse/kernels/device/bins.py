"""The bins of `TileCounts.histogram`."""

from __future__ import annotations

BINS = 256
BINS_PER_OCTAVE = 8
"""By how many lambda halves."""

"""From counts of tiles to thresholds."""

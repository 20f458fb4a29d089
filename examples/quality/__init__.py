"""What leaving tiles out costs the bundled model: its tasks and its bits per byte, dense beside sparse."""

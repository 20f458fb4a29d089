"""What can be done to a tile of scores, one file each, as Triton functions."""

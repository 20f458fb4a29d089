"""Small Triton functions that the kernels share. No launch code."""

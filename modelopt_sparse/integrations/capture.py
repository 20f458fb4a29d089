"""Whether a CUDA graph is being captured."""

from __future__ import annotations

import torch


def is_capturing(device: torch.device) -> bool:
    """Whether calls on `device` are recorded, not run: nothing that they compute can be read."""
    if torch.compiler.is_compiling():
        return False
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

"""Memory that nobody wrote holds NaN, so that a kernel that reads it is found out."""

from __future__ import annotations

import os

import pytest
import torch

# Triton decides when it is imported: with no GPU its kernels are tested in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Here, because pytest asks only the outermost files for it when tests run in several processes.
from tests.conformance.summary import (
    pytest_terminal_summary,  # noqa: F401 (a hook)
)


def _poisoned(allocate):
    def poisoned(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() and tensor.device.type != "meta":
            with torch.no_grad():
                tensor.detach().fill_(float("nan"))
        return tensor

    return poisoned


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(monkeypatch):
    """torch.empty, empty_like and new_empty return NaN in floating tensors."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))

"""Checkpoints of a calibrated sparse model, to be damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modelopt_sparse as mtsa
from modelopt_sparse.modes import checkpoint
from tests.cpu import tiny

STATE, WEIGHTS = checkpoint.STATE_FILE, checkpoint.WEIGHTS_FILE
SKIP = "triton_skip_softmax"
CALIBRATED: dict[str, Any] = {
    "target_sparsity": 0.5,
    "formula": {"a": 2.5, "b": 3.0, "worst_error": None},
    "table": {
        "lengths": [64, 512],
        "targets": [0.2, 0.8],
        "factors": [[[1.0, 2.0], [3.0, 4.0]]] * 2,
    },
}
RULES = {
    "default": {"enable": False},
    "*": {"method": SKIP, "skip_softmax_threshold": CALIBRATED, "min_context": "auto"},
    "*.{0..3}.*": {"method": "flash_skip_softmax", "thresholds": {"prefill": [CALIBRATED, 0.1]}},
    "type:Llama*": {"enable": True},
}


def sparse_model() -> Any:
    """A tiny model that is sparse by `RULES`."""
    return mtsa.sparsify(tiny.tiny_llama(), {"sparse_cfg": RULES})


def saved_files(folder: Path) -> dict[str, bytes]:
    """What `mtsa.save` writes of it; and of ``save_pretrained``, config.json and, as "hf", the weights."""
    model = sparse_model()
    mtsa.save(model, folder)
    model.save_pretrained(folder / "hf")
    return {
        STATE: (folder / STATE).read_bytes(),
        WEIGHTS: (folder / WEIGHTS).read_bytes(),
        "config.json": (folder / "hf" / "config.json").read_bytes(),
        "hf": (folder / "hf" / WEIGHTS).read_bytes(),
    }

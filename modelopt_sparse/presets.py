"""Ready-made configurations, frozen. Derive your own: ``PRESET.with_rule("*", field=value)``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .config import SparseAttentionConfig

SKIP_SOFTMAX_TRITON_DEFAULT = SparseAttentionConfig(
    sparse_cfg={
        "default": {"enable": False},
        "*": {
            "method": "triton_skip_softmax",
            "backend": "triton",
            "skip_softmax_threshold": 0.1,
        },
    }
)
"""Skip-softmax at lambda 0.1 in prefill, decode dense, in every causal self-attention.

Of the lambdas measured on the bundled model, 0.1 is the largest that costs at most 0.003 bits per byte at
4k tokens, and it does at 8k: docs/quality.md.
"""

SPARSE_SOFTMAX_DEFAULT = SparseAttentionConfig(
    sparse_cfg={
        "default": {"enable": False},
        "*": {
            "method": "triton_sparse_softmax",
            "backend": "triton",
            "sparsity_n": 2,
            "sparsity_m": 4,
            "num_sink_tokens": 0,
            "dense_window_size": 64,
        },
    }
)
"""2:4 sparse softmax outside a window of 64 keys in prefill, in every causal self-attention.

On text of 2k to 8k tokens it cost the bundled model 0.0013 to 0.0017 bits per byte, and no task more than
0.2 points: docs/quality.md. Other N:M, windows and sinks weren't measured there.
"""

SKIP_SOFTMAX_TRITON_CALIB = SparseAttentionConfig(
    sparse_cfg=SKIP_SOFTMAX_TRITON_DEFAULT.sparse_cfg,
    calibration={"target_sparse_ratio": {"prefill": 0.5, "decode": 0.5}},
)
"""Skip-softmax calibrated to leave out half of the tiles, in prefill and in decode.

Half is well before bits rise steeply. In prefill of the bundled model, on text of 4k tokens, lambda 0.03 left
out 49.7 %, which cost 0.0006 bits per byte and no answer to a task; 0.1 left out 63.2 % for 0.0011 bits, and
0.3 left out 72.6 % for 0.0055. In decode, 0.01 left out 75.6 % at no cost that shows. On text of 2k to 8k
tokens this preset left out 42.8 to 44.8 % in prefill, which cost 0.0002 to 0.0007 bits: docs/quality.md.
"""

SKIP_SPARSE_SOFTMAX_DEFAULT = SparseAttentionConfig(
    sparse_cfg={
        "default": {"enable": False},
        "*": {
            "method": "triton_skip_sparse_softmax",
            "backend": "triton",
            "skip_softmax_threshold": 0.1,
            "sparsity_n": 2,
            "sparsity_m": 4,
            "num_sink_tokens": 0,
            "dense_window_size": 64,
        },
    }
)
"""2:4 sparse softmax and then skip-softmax at lambda 0.1 in prefill, in every causal self-attention.

On text of 2k to 8k tokens it cost the bundled model 0.0022 to 0.0038 bits per byte, and no task more than
0.4 points: docs/quality.md.
"""

SKIP_SOFTMAX_DEFAULT = SparseAttentionConfig(
    sparse_cfg={
        "default": {"enable": False},
        "*": {
            "method": "flash_skip_softmax",
            "backend": "pytorch",
            "thresholds": {"prefill": [0.1], "decode": [0.01]},
            "br": 64,
            "bc": 128,
        },
    }
)
"""Skip-softmax at lambda 0.1 in prefill and 0.01 in decode, in the torch reference.

In prefill it decides as `SKIP_SOFTMAX_TRITON_DEFAULT`. Of the lambdas measured in decode, 0.01 is the largest
that costs the bundled model at most 0.003 bits per byte: docs/quality.md.
"""

SKIP_SOFTMAX_CALIB = SparseAttentionConfig(
    sparse_cfg=SKIP_SOFTMAX_DEFAULT.sparse_cfg,
    calibration={"target_sparse_ratio": {"prefill": 0.5, "decode": 0.5}},
)
"""The same, calibrated to leave out half of the tiles, in prefill and in decode."""

PRESETS: Mapping[str, SparseAttentionConfig] = MappingProxyType(
    {
        "skip_softmax": SKIP_SOFTMAX_TRITON_DEFAULT,
        "sparse_softmax": SPARSE_SOFTMAX_DEFAULT,
        "skip_sparse_softmax": SKIP_SPARSE_SOFTMAX_DEFAULT,
        "flash_skip_softmax": SKIP_SOFTMAX_DEFAULT,
        "skip_softmax_calib": SKIP_SOFTMAX_TRITON_CALIB,
        "flash_skip_softmax_calib": SKIP_SOFTMAX_CALIB,
    }
)
"""The presets by the names that command lines take."""

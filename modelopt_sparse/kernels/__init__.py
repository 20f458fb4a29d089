"""Attention kernels: torch only, no models, no configurations. `attention_varlen` is the full entry."""

from __future__ import annotations

from .api import (
    AttentionOptions,
    attention,
    attention_paged,
    attention_reference,
    attention_triton,
    attention_varlen,
)
from .choices import KernelChoice, explain
from .merge import merge_states
from .pages import PagedKV
from .scale_factors import ScaleFactors
from .types import (
    DENSE,
    AttentionOutput,
    NMSparsity,
    Phase,
    Plan,
    ScoreGrid,
    Seqs,
    SkipSoftmax,
    SkipSoftmaxDecode,
    TileCounts,
    TileMap,
)

IS_AVAILABLE = True
"""Whether `attention` can be called: always on CPU tensors, by the reference; GPU tensors need Triton."""


def register_triton_attention() -> None:
    """Makes ``attn_implementation="modelopt_triton"`` known to transformers.

    Importing `modelopt_sparse` does it already. Here for callers who look for it beside `attention`, and
    the one place where this folder reaches out of itself.
    """
    from modelopt_sparse.integrations import hf

    hf.register()


__all__ = [
    "DENSE",
    "IS_AVAILABLE",
    "AttentionOptions",
    "AttentionOutput",
    "KernelChoice",
    "NMSparsity",
    "PagedKV",
    "Phase",
    "Plan",
    "ScaleFactors",
    "ScoreGrid",
    "Seqs",
    "SkipSoftmax",
    "SkipSoftmaxDecode",
    "TileCounts",
    "TileMap",
    "attention",
    "attention_paged",
    "attention_reference",
    "attention_triton",
    "attention_varlen",
    "explain",
    "merge_states",
    "register_triton_attention",
]

"""Sparse attention methods. Importing this package registers those that come with it."""

from .base import SparseMethod, SparseMethodConfig
from .flash_skip_softmax import FlashSkipSoftmax, FlashSkipSoftmaxConfig, PhaseThresholds
from .registry import register_sparse_method, sparse_method, sparse_methods
from .skip_softmax import TritonSkipSoftmax, TritonSkipSoftmaxConfig
from .skip_sparse_softmax import TritonSkipSparseSoftmax, TritonSkipSparseSoftmaxConfig
from .sparse_softmax import TritonSparseSoftmax, TritonSparseSoftmaxConfig

__all__ = [
    "FlashSkipSoftmax",
    "FlashSkipSoftmaxConfig",
    "PhaseThresholds",
    "SparseMethod",
    "SparseMethodConfig",
    "TritonSkipSoftmax",
    "TritonSkipSoftmaxConfig",
    "TritonSkipSparseSoftmax",
    "TritonSkipSparseSoftmaxConfig",
    "TritonSparseSoftmax",
    "TritonSparseSoftmaxConfig",
    "register_sparse_method",
    "sparse_method",
    "sparse_methods",
]

"""Skip-softmax and N:M sparse softmax together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from modelopt_sparse.kernels.types import Plan

from .base import SparseMethod
from .registry import register_sparse_method
from .skip_softmax import TritonSkipFields, skip_plan
from .sparse_softmax import NMFields, nm_part


class TritonSkipSparseSoftmaxConfig(TritonSkipFields, NMFields):
    """Configuration of `TritonSkipSparseSoftmax`: `TritonSkipFields` and `NMFields`."""

    abandoned: ClassVar[Mapping[str, str]] = {**NMFields.abandoned, **TritonSkipFields.abandoned}

    method: Literal["triton_skip_sparse_softmax"] = "triton_skip_sparse_softmax"


@register_sparse_method
class TritonSkipSparseSoftmax(SparseMethod[TritonSkipSparseSoftmaxConfig]):
    """N:M first, in prefill; then tiles whose every row lies far below its running maximum are skipped.

    Source: DFSS (arXiv 2203.00091); BLASST (arXiv 2512.12087).
    """

    Config = TritonSkipSparseSoftmaxConfig

    def plan(self) -> Plan:
        """What both methods leave out."""
        return replace(skip_plan(self.config), nm=nm_part(self.config))

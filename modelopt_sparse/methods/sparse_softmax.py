"""N:M sparse softmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import model_validator

from modelopt_sparse.errors import ConfigError, describe
from modelopt_sparse.kernels.types import DENSE, NMSparsity, Plan

from .base import SparseMethod, SparseMethodConfig
from .fields import Tokens, one_of, whole_number
from .registry import register_sparse_method


class NMFields(SparseMethodConfig):
    """Which keys stay, in prefill.

    Args:
        sparsity_n, sparsity_m: of every m consecutive keys the n largest scores stay. m is 4 or 8,
            1 <= n <= m; n == m is dense.
        num_sink_tokens: so many keys at the sequence's start always stay; 0 or more.
        dense_window_size: so many keys up to and with the query's own always stay; 0 or more.
    """

    aliases: ClassVar[Mapping[str, str]] = {
        "dense_sink_tokens": "num_sink_tokens",
        "dense_recent_tokens": "dense_window_size",
    }
    abandoned: ClassVar[Mapping[str, str]] = {
        "dense_window_blocks": "dense_window_size",
        "n": "sparsity_n",
        "m": "sparsity_m",
    }

    sparsity_n: Annotated[int, whole_number(1, 8)] = 2
    sparsity_m: Annotated[int, one_of(4, 8)] = 4
    num_sink_tokens: Tokens = 0
    dense_window_size: Tokens = 64

    @model_validator(mode="after")
    def _n_within_m(self) -> Self:
        if self.sparsity_n > self.sparsity_m:
            raise ConfigError(
                describe(
                    "sparsity_n",
                    self.sparsity_n,
                    f"an integer from 1 to sparsity_m, which is {self.sparsity_m}",
                )
            )
        return self


class TritonSparseSoftmaxConfig(NMFields):
    """Configuration of `TritonSparseSoftmax`: `NMFields`."""

    method: Literal["triton_sparse_softmax"] = "triton_sparse_softmax"


@register_sparse_method
class TritonSparseSoftmax(SparseMethod[TritonSparseSoftmaxConfig]):
    """Keeps the N largest scores of every M consecutive keys; prefill only, decode is dense.

    Source: N:M structured sparsity (arXiv 2104.08378), applied to attention scores as in
    DFSS (arXiv 2203.00091).
    """

    Config = TritonSparseSoftmaxConfig

    def plan(self) -> Plan:
        """N:M sparsity, dense where n == m."""
        nm = nm_part(self.config)
        return DENSE if nm is None else Plan(nm=nm)


def nm_part(config: NMFields) -> NMSparsity | None:
    """What these fields say, as a part of a plan; None for dense."""
    if config.sparsity_n == config.sparsity_m:
        return None
    return NMSparsity(
        config.sparsity_n, config.sparsity_m, config.num_sink_tokens, config.dense_window_size
    )

"""What is compared with dense attention: presets, other choices of tiles, other settings of skip-softmax."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

import modelopt_sparse as mtsa
from examples.quality.choosing import chosen_like
from examples.quality.orders import ORDERS
from examples.quality.selectors import SELECTORS, Selector
from modelopt_sparse.calls import AttentionCall, Observer
from modelopt_sparse.kernels import AttentionOutput, Plan, SkipSoftmax
from modelopt_sparse.module import observed
from modelopt_sparse.module_state import sparse_modules

DEFAULT = mtsa.SKIP_SOFTMAX_TRITON_DEFAULT
LAMBDA = 0.1
DECODE = "decode"
"""The group whose answers are decoded token by token; the others run prompts whole."""
DECODE_LAMBDAS = (0.0001, 0.001, 0.01, 0.1, 0.5)
LAMBDAS = (0.001, 0.01, 0.03, 0.3, 0.5, 0.9)
TILES = ((16, 128), (32, 128), (64, 32), (64, 64), (128, 64), (128, 128))


@dataclass(frozen=True)
class Variant:
    """A way to leave tiles out.

    Args:
        name: what tables call it.
        config: what the model is sparsified with.
        observer: who computes the calls in place of what `config` says; None: nobody.
    """

    name: str
    config: mtsa.SparseAttentionConfig = DEFAULT
    observer: Observer | None = None

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The dense model computes like this in this block."""
        mtsa.sparsify(model, self.config)
        try:
            modules = [module for _, module in sparse_modules(model)]
            with observed(dict.fromkeys(modules, self.observer) if self.observer else {}):
                yield
        finally:
            mtsa.unsparsify(model)


def choosing(selector: Selector) -> Observer:
    """As many tiles of each head as skip-softmax would keep, chosen by a selector."""

    def observe(call: AttentionCall, plan: Plan) -> AttentionOutput:
        return call(Plan(tiles=chosen_like(call, plan, selector)))

    return observe


def planned(skip: SkipSoftmax) -> Observer:
    """Skip-softmax with settings that no configuration has."""

    def observe(call: AttentionCall, _plan: Plan) -> AttentionOutput:
        return call(Plan(skip=skip))

    return observe


def _in_decode() -> list[Variant]:
    def config(threshold: object, **fields: object) -> mtsa.SparseAttentionConfig:
        return DEFAULT.with_rule(
            "*",
            skip_softmax_threshold=None,
            skip_softmax_decode_threshold=threshold,
            **fields,
        )

    return [
        *(Variant(f"lambda {value:g}", config(value)) for value in DECODE_LAMBDAS),
        Variant("segments of 2048", config(LAMBDA, decode_segment_keys=2048)),
        Variant("tiles of 16", config(LAMBDA, decode_block_keys=16, decode_segment_keys=512)),
        Variant("heads alone", config(LAMBDA, decode_vote_heads=1)),
    ]


def _settings() -> list[Variant]:
    found = [
        Variant(f"lambda {value:g}", observer=planned(SkipSoftmax(value))) for value in LAMBDAS
    ]
    for rows, keys in TILES:
        skip = SkipSoftmax(LAMBDA, rows, keys)
        found.append(Variant(f"tile {rows} x {keys}", observer=planned(skip)))
    exact = SkipSoftmax(LAMBDA, exact_normalizer=True)
    return [*found, Variant("exact normaliser", observer=planned(exact))]


def _choices(selectors: Mapping[str, Selector]) -> list[Variant]:
    chosen = [Variant(name, observer=choosing(value)) for name, value in selectors.items()]
    return [Variant("skip-softmax"), *chosen]


GROUPS: Mapping[str, Sequence[Variant]] = MappingProxyType(
    {
        "presets": [Variant(name, config) for name, config in mtsa.PRESETS.items()],
        "selectors": _choices(SELECTORS),
        "orders": _choices(ORDERS),
        "settings": _settings(),
        DECODE: _in_decode(),
    }
)
"""By the names that the command line takes. Of one group, all are measured on the same samples."""

"""The plans that the methods make, and the context that puts one in force."""

import pytest
import torch

from modelopt_sparse.errors import ArgumentTypeError
from modelopt_sparse.kernels.types import Plan
from modelopt_sparse.methods import (
    FlashSkipSoftmax,
    FlashSkipSoftmaxConfig,
    TritonSkipSoftmax,
    TritonSkipSoftmaxConfig,
    TritonSkipSparseSoftmax,
    TritonSkipSparseSoftmaxConfig,
    TritonSparseSoftmax,
    TritonSparseSoftmaxConfig,
)
from modelopt_sparse.methods.fields import AUTO_MIN_CONTEXT
from modelopt_sparse.module import SparseAttentionModule

SKIP, NM, FLASH = "triton_skip_softmax", "triton_sparse_softmax", "flash_skip_softmax"
BOTH = "triton_skip_sparse_softmax"
BUILT_IN = {
    SKIP: (TritonSkipSoftmax, TritonSkipSoftmaxConfig),
    NM: (TritonSparseSoftmax, TritonSparseSoftmaxConfig),
    FLASH: (FlashSkipSoftmax, FlashSkipSoftmaxConfig),
    BOTH: (TritonSkipSparseSoftmax, TritonSkipSparseSoftmaxConfig),
}


def numbers(plan: Plan):
    return tuple(part and vars(part) for part in (plan.nm, plan.skip, plan.skip_decode))


def skip(threshold, rows=64, keys=128, counted=(), least=0):
    return {
        "threshold": threshold,
        "block_rows": rows,
        "block_keys": keys,
        "count_thresholds": counted,
        "exact_normalizer": False,
        "min_context": least,
        "histogram": False,
        "scale_factor": None,
    }


def skip_decode(threshold, counted=(), keys=64, heads=None, least=0, segment=4096):
    return {
        "threshold": threshold,
        "block_keys": keys,
        "segment_keys": segment,
        "vote_heads": heads,
        "count_thresholds": counted,
        "exact_normalizer": False,
        "min_context": least,
        "histogram": False,
        "scale_factor": None,
    }


@pytest.mark.parametrize(
    ("fields", "plan"),
    [
        ({}, (None, skip(0.1), None)),
        ({"skip_softmax_threshold": 1}, (None, skip(1.0), None)),
        ({"skip_softmax_threshold": 1e-30}, (None, skip(1e-30), None)),
        ({"skip_softmax_threshold": None}, (None, None, None)),
        ({"skip_softmax_threshold": 0}, (None, None, None)),
        ({"skip_softmax_threshold": -0.0}, (None, None, None)),
        ({"skip_softmax_decode_threshold": "1e-3"}, (None, skip(0.1), skip_decode(1e-3))),
        ({"skip_softmax_decode_threshold": 0}, (None, skip(0.1), None)),
        (
            {"skip_softmax_decode_threshold": 0.2, "decode_block_keys": 32, "decode_vote_heads": 1},
            (None, skip(0.1), skip_decode(0.2, keys=32, heads=1)),
        ),
        (
            {"skip_softmax_decode_threshold": 0.2, "decode_segment_keys": "1024"},
            (None, skip(0.1), skip_decode(0.2, segment=1024)),
        ),
        (
            {"skip_softmax_threshold": 0, "skip_softmax_decode_threshold": 0.2},
            (None, None, skip_decode(0.2)),
        ),
        (
            {"skip_softmax_decode_threshold": 0.2, "min_context": "300"},
            (None, skip(0.1, least=300), skip_decode(0.2, least=300)),
        ),
        ({"min_context": "auto"}, (None, skip(0.1, least=AUTO_MIN_CONTEXT), None)),
    ],
    ids=repr,
)
def test_skip_softmax_plans_each_phase_by_its_threshold(fields, plan):
    assert numbers(TritonSkipSoftmax(TritonSkipSoftmaxConfig(**fields)).plan()) == plan


def nm(n, m, sinks=0, window=64):
    return {"n": n, "m": m, "num_sink_tokens": sinks, "dense_window_size": window}


@pytest.mark.parametrize(
    ("fields", "plan"),
    [
        ({}, (nm(2, 4), None, None)),
        ({"sparsity_n": 1, "sparsity_m": 8}, (nm(1, 8), None, None)),
        ({"num_sink_tokens": 3, "dense_window_size": 0}, (nm(2, 4, 3, 0), None, None)),
        ({"sparsity_n": 4}, (None, None, None)),
        ({"sparsity_n": 8, "sparsity_m": 8, "num_sink_tokens": 3}, (None, None, None)),
    ],
    ids=repr,
)
def test_sparse_softmax_plans_n_of_m_and_nothing_where_n_is_m(fields, plan):
    assert numbers(TritonSparseSoftmax(TritonSparseSoftmaxConfig(**fields)).plan()) == plan


@pytest.mark.parametrize(
    ("fields", "plan"),
    [
        ({}, (None, skip(0.1), skip_decode(0.01))),
        ({"br": 16, "bc": 32}, (None, skip(0.1, 16, 32), skip_decode(0.01))),
        (
            {"thresholds": {"prefill": [0.5, 0.1, 0.2], "decode": [0.1, 1]}},
            (None, skip(0.5, counted=(0.1, 0.2)), skip_decode(0.1, (1.0,))),
        ),
        ({"thresholds": {"prefill": [0.5]}}, (None, skip(0.5), None)),
        ({"thresholds": {"decode": [0.5], "prefill": None}}, (None, None, skip_decode(0.5))),
        ({"thresholds": {"prefill": [0], "decode": ["-0.0"]}}, (None, None, None)),
        (
            {"thresholds": {"prefill": [0, 0.1], "decode": [0, 0.2]}},
            (None, skip(None, counted=(0.1,)), skip_decode(None, (0.2,))),
        ),
        (
            {"min_context": "auto"},
            (
                None,
                skip(0.1, least=AUTO_MIN_CONTEXT),
                skip_decode(0.01, least=AUTO_MIN_CONTEXT),
            ),
        ),
    ],
    ids=repr,
)
def test_flash_skip_softmax_applies_the_first_lambda_and_counts_the_others(fields, plan):
    assert numbers(FlashSkipSoftmax(FlashSkipSoftmaxConfig(**fields)).plan()) == plan


def test_skip_sparse_softmax_leaves_out_what_both_do():
    config = TritonSkipSparseSoftmaxConfig(
        skip_softmax_threshold=0.2, skip_softmax_decode_threshold=0.3, sparsity_n=1, min_context=9
    )
    both = numbers(TritonSkipSparseSoftmax(config).plan())
    assert both == (nm(1, 4), skip(0.2, least=9), skip_decode(0.3, least=9))
    dense_nm = TritonSkipSparseSoftmaxConfig(sparsity_n=4, skip_softmax_threshold=0.2)
    assert numbers(TritonSkipSparseSoftmax(dense_nm).plan()) == (None, skip(0.2), None)


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("keys", [16, 32, 64, 128])
def test_every_decision_tile_reaches_the_plan(rows, keys):
    plan = FlashSkipSoftmax(FlashSkipSoftmaxConfig(br=rows, bc=keys)).plan()
    assert (plan.skip.block_rows, plan.skip.block_keys) == (rows, keys)
    assert plan.skip_decode.block_keys == 64


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_method_names_its_paper_and_documents_its_fields(name):
    method, config = BUILT_IN[name]
    assert "arXiv" in method.__doc__
    said = "".join(cls.__doc__ or "" for cls in config.__mro__ if cls.__module__ != "pydantic.main")
    assert not [field for field in config.model_fields if field not in said]


def test_a_method_refuses_another_s_configuration():
    with pytest.raises(ArgumentTypeError, match="takes a TritonSkipSoftmaxConfig"):
        TritonSkipSoftmax(FlashSkipSoftmaxConfig())


class Attention(SparseAttentionModule):
    """A sparse module without a model around it."""


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_context_yields_the_plan_and_puts_the_previous_one_back(name):
    method, config = BUILT_IN[name]
    module = Attention()
    module.attach(method(config()), True)
    before = Plan()
    module.active_plan = before
    with module.method.get_sparse_context(module) as plan:
        assert module.active_plan is plan
        assert numbers(plan) == numbers(module.method.plan())
        with module.method.get_sparse_context(module) as inner:
            assert module.active_plan is inner
        assert module.active_plan is plan
    assert module.active_plan is before
    with pytest.raises(KeyError), module.method.get_sparse_context(module):
        raise KeyError
    assert module.active_plan is before


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_context_compiles_without_a_graph_break(name):
    method, config = BUILT_IN[name]

    class Scaled(SparseAttentionModule):
        def forward(self, x):
            with self.method.get_sparse_context(self) as plan:
                return x * (2 if plan.skip is None else plan.skip.threshold)

    module = Scaled()
    module.attach(method(config()), True)
    x = torch.ones(2)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), module(x))

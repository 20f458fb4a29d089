"""Registering methods, and using those of another package."""

from typing import Literal, get_args

import pytest
from pydantic import model_validator
from torch import nn

from modelopt_sparse.config import SparseAttentionConfig
from modelopt_sparse.errors import ConfigError
from modelopt_sparse.kernels.types import Plan
from modelopt_sparse.methods import (
    FlashSkipSoftmax,
    FlashSkipSoftmaxConfig,
    SparseMethod,
    SparseMethodConfig,
    TritonSkipSoftmax,
    TritonSkipSoftmaxConfig,
    TritonSkipSparseSoftmax,
    TritonSkipSparseSoftmaxConfig,
    TritonSparseSoftmax,
    TritonSparseSoftmaxConfig,
    register_sparse_method,
    registry,
    sparse_method,
    sparse_methods,
)
from modelopt_sparse.patterns import Target

SKIP, NM, FLASH = "triton_skip_softmax", "triton_sparse_softmax", "flash_skip_softmax"
SKIP_NM = "triton_skip_sparse_softmax"
BUILT_IN = {
    SKIP: (TritonSkipSoftmax, TritonSkipSoftmaxConfig),
    NM: (TritonSparseSoftmax, TritonSparseSoftmaxConfig),
    FLASH: (FlashSkipSoftmax, FlashSkipSoftmaxConfig),
    SKIP_NM: (TritonSkipSparseSoftmax, TritonSkipSparseSoftmaxConfig),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_methods_are_registered_by_name(name):
    assert sparse_method(name) is BUILT_IN[name][0]
    assert sparse_methods()[name].Config is BUILT_IN[name][1]
    assert get_args(BUILT_IN[name][1].model_fields["method"].annotation) == (name,)


@pytest.mark.parametrize("name", ["", "nope", None, 3, [], SKIP.upper(), "n" * 10_000])
def test_an_unknown_method_lists_the_registered_ones(name):
    with pytest.raises(ConfigError, match=r"method.*flash_skip_softmax.*triton_skip") as refusal:
        sparse_method(name)
    assert len(str(refusal.value)) < 300


def test_the_registry_is_read_only():
    with pytest.raises(TypeError):
        sparse_methods()["mine"] = TritonSkipSoftmax


@pytest.fixture
def own_registry(monkeypatch):
    """Methods that a test registers are gone after it."""
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))


def test_a_method_of_another_package_works_in_configurations(own_registry):
    class KeepNothingConfig(SparseMethodConfig):
        method: Literal["keep_nothing"] = "keep_nothing"
        backend: Literal["triton"] = "triton"
        amount: int = 1

    @register_sparse_method
    class KeepNothing(SparseMethod[KeepNothingConfig]):
        Config = KeepNothingConfig

        def plan(self):
            return Plan()

    rules = {"*": {"method": "keep_nothing"}, "*.0.*": {"amount": 5}, "*.1.*": {"enable": False}}
    config = SparseAttentionConfig(sparse_cfg=rules)
    found = config.resolve_all([Target(f"l.{i}.attn", "A", nn.Identity()) for i in range(3)])
    assert [found[f"l.{i}.attn"].config.amount for i in range(3)] == [5, 1, 1]
    assert [found[f"l.{i}.attn"].enabled for i in range(3)] == [True, False, True]
    assert SparseAttentionConfig.load(config.to_dict()) == config
    assert KeepNothing(found["l.0.attn"].config).plan() is not None
    instance = SparseAttentionConfig(sparse_cfg={"*": KeepNothingConfig(amount=7)})
    assert instance.sparse_cfg["*"] == {"method": "keep_nothing", "backend": "triton", "amount": 7}
    for bad in ({"backend": "pytorch"}, {"amount": "x"}, {"amout": 2}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            SparseAttentionConfig(sparse_cfg={"*": {"method": "keep_nothing", **bad}})


def test_a_field_that_only_fits_with_another_is_taken_where_the_other_may_change(own_registry):
    class OrderedConfig(SparseMethodConfig):
        method: Literal["ordered"] = "ordered"
        low: int = 1
        high: int = 2

        @model_validator(mode="after")
        def _in_order(self):
            if self.low > self.high:
                raise ValueError("low: takes at most high")
            return self

    @register_sparse_method
    class Ordered(SparseMethod[OrderedConfig]):
        Config = OrderedConfig

        def plan(self):
            return Plan()

    rules = {"a": {"method": "ordered", "high": 9}, "b": {"method": "ordered"}, "*": {"low": "5"}}
    config = SparseAttentionConfig(sparse_cfg=rules)
    assert config.resolve(Target("a", "", None)).config == OrderedConfig(low=5, high=9)
    with pytest.raises(ConfigError, match="low: takes at most high"):
        config.resolve(Target("b", "", None))
    with pytest.raises(ConfigError, match=r"'\*'\]\.low: got 'x'"):
        SparseAttentionConfig(sparse_cfg={**rules, "*": {"low": "x"}})


def test_what_a_field_holds_is_not_shared_with_its_author(own_registry):
    class ListedConfig(SparseMethodConfig):
        method: Literal["listed"] = "listed"
        layers: object = ()

    @register_sparse_method
    class Listed(SparseMethod[ListedConfig]):
        Config = ListedConfig

        def plan(self):
            return Plan()

    layers = [1]
    config = SparseAttentionConfig(sparse_cfg={"*": {"method": "listed", "layers": layers}})
    layers.append(2)
    assert config.resolve(Target("a", "", None)).config.layers == [1]


class NamedConfig(SparseMethodConfig):
    method: Literal["named"] = "named"


class NamelessConfig(SparseMethodConfig):
    pass


class NeedyConfig(SparseMethodConfig):
    method: Literal["needy"] = "needy"
    amount: int


class ThawedConfig(SparseMethodConfig, frozen=False):
    method: Literal["thawed"] = "thawed"


class LooseConfig(SparseMethodConfig, extra="allow"):
    method: Literal["loose"] = "loose"


class TakenConfig(SparseMethodConfig):
    method: Literal["triton_skip_softmax"] = "triton_skip_softmax"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "Config"),
        ("named", "Config"),
        (nn.Module, "Config"),
        (NamedConfig(), "Config"),
        (NamelessConfig, "NamelessConfig.method"),
        (NeedyConfig, "NeedyConfig.amount"),
        (ThawedConfig, "frozen=True"),
        (LooseConfig, "extra='forbid'"),
        (TakenConfig, "a name that is free"),
    ],
    ids=repr,
)
def test_a_method_with_a_wrong_configuration_class_is_not_registered(own_registry, config, says):
    before = set(sparse_methods())
    body = {"Config": config, "plan": lambda self: Plan()}
    with pytest.raises(ConfigError, match=says):
        register_sparse_method(type("Method", (SparseMethod,), body))
    assert set(registry._methods) == before


def test_a_method_without_configuration_is_not_registered(own_registry):
    class Bare(SparseMethod):
        def plan(self):
            return Plan()

    with pytest.raises(ConfigError, match=r"Bare\.Config"):
        register_sparse_method(Bare)


def test_a_method_without_plan_is_neither_registered_nor_instantiated(own_registry):
    class Planless(SparseMethod[NamedConfig]):
        Config = NamedConfig

    with pytest.raises(ConfigError, match="Planless: got no plan"):
        register_sparse_method(Planless)
    with pytest.raises(TypeError, match="plan"):
        Planless(NamedConfig())


@pytest.mark.parametrize("thing", [None, "x", NamedConfig, nn.Module, print], ids=repr)
def test_only_methods_are_registered(own_registry, thing):
    with pytest.raises(ConfigError, match="a subclass of SparseMethod"):
        register_sparse_method(thing)


def test_registering_a_class_again_replaces_it(own_registry):
    def define():
        @register_sparse_method
        class Again(SparseMethod[NamedConfig]):
            Config = NamedConfig

            def plan(self):
                return Plan()

        return Again

    first = define()
    second = define()
    assert sparse_method("named") is second is not first


def test_the_configuration_of_an_unregistered_method_is_no_rule():
    with pytest.raises(ConfigError, match=r"NamedConfig.*registered method"):
        SparseAttentionConfig(sparse_cfg={"*": NamedConfig()})
    with pytest.raises(ConfigError, match=r"TakenConfig.*registered method"):
        SparseAttentionConfig(sparse_cfg={"*": TakenConfig()})

"""Turning attention modules into sparse ones and back, all or nothing.

A module is converted by extending its class, as FSDP2 and torch's parametrizations do. Its parameters,
hooks, state_dict keys and isinstance relations stay. The configurations that name the attention function
are replaced by copies, because another model may share the object.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from types import FunctionType
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from modelopt_sparse.config import Resolved
from modelopt_sparse.config.checkpoints import BLOCK_NAMES
from modelopt_sparse.errors import UnsupportedModel, describe
from modelopt_sparse.integrations.hf import ATTENTION_NAME
from modelopt_sparse.integrations.hf_checkpoint import is_ours
from modelopt_sparse.integrations.hf_paged import ENTRY, PAGED_NAME, refuse_continuous_batching
from modelopt_sparse.methods.registry import sparse_method
from modelopt_sparse.module import SparseAttentionModule

# On a module, by attribute name: the configuration that it had, and that configuration as copied, before
# anyone could edit it.
_DENSE_CONFIGS = "_dense_configs"


def convert(model: nn.Module, resolved: Mapping[str, Resolved]) -> None:
    """Makes the named modules sparse and every other one dense. To be called where it can be undone.

    Raises:
        UnsupportedModel: a module has no configuration that names its attention function, or
            attributes where a sparse one has its own.
        ConfigError: a method can't make a plan of its configuration.
    """
    modules = {name: model.get_submodule(name) for name in resolved}
    methods = {
        name: sparse_method(rule.config.method)(rule.config) for name, rule in resolved.items()
    }
    for name, module in modules.items():
        methods[name].plan()
        if not isinstance(getattr(module, "config", None), PretrainedConfig):
            raise UnsupportedModel(
                describe(name, "a module without a config", "one whose config names its attention")
            )
        if getattr(module.config, "output_attentions", False):
            remedy = "The weights of sparse attention never exist as a tensor."
            raise UnsupportedModel(describe("config.output_attentions", True, "False", remedy))
    deconvert(model)
    _privatise_configs(model)
    for name, module in modules.items():
        _refuse_clashes(name, module)
        config: Any = module.config
        config._attn_implementation_internal = ATTENTION_NAME
        dense: Any = type(module)
        module.__class__ = sparse_class(dense)
        assert isinstance(module, SparseAttentionModule)
        module.attach(methods[name], resolved[name].enabled)
    for part in model.modules():
        if hasattr(type(part), ENTRY):
            part.__dict__[ENTRY] = refuse_continuous_batching


def deconvert(model: nn.Module) -> None:
    """Gives every module its own class and configuration back. Other edits of a configuration stay.

    Raises:
        UnsupportedModel: a class that extends a sparse one can't be made to extend the dense one, or the
            model is in a block of `continuous_batching`.
    """
    for module in model.modules():
        if getattr(getattr(module, "config", None), "_attn_implementation", "") == PAGED_NAME:
            got = "one inside of modelopt_sparse.continuous_batching"
            raise UnsupportedModel(describe("model", got, "one outside of it", "Leave it first."))
    pairs: dict[int, tuple[PretrainedConfig, PretrainedConfig, PretrainedConfig]] = {}
    for module in model.modules():
        if isinstance(module, SparseAttentionModule):
            sparse: Any = type(module)
            module.detach()
            module.__class__ = dense_class(sparse)
        if module.__dict__.get(ENTRY) is refuse_continuous_batching:
            del module.__dict__[ENTRY]
        for name, (original, copied) in module.__dict__.pop(_DENSE_CONFIGS, {}).items():
            current = module.__dict__[name]
            pairs[id(current)] = (current, original, copied)
            module.__dict__[name] = original
    for current, original, copied in pairs.values():
        _replay_edits(current, original, copied)


def configurations(model: nn.Module) -> list[PretrainedConfig]:
    """Every configuration that a conversion may write to, those within configurations included."""
    found: dict[int, PretrainedConfig] = {}

    def add(config: object) -> None:
        if isinstance(config, PretrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for part in config.__dict__.values():
                add(part)

    for module in model.modules():
        for value in module.__dict__.values():
            add(value)
        for original, _ in module.__dict__.get(_DENSE_CONFIGS, {}).values():
            add(original)
    return list(found.values())


@cache
def sparse_class(dense: Any) -> Any:
    """The class `dense`, extended. One for each class, so that equal modules stay of equal type."""

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # Pickle can't find a class that was made here by its name: it is made again from the dense one.
        if type(self) is sparse_class(dense):
            return _rebuild, (dense,), self.__dict__.copy()
        return object.__reduce_ex__(self, protocol)  # type: ignore[return-value]

    namespace = {
        "__module__": dense.__module__,
        "__doc__": dense.__doc__,
        "__reduce_ex__": reduce,
        "dense_class": dense,
    }
    return type(f"Sparse{dense.__name__}", (SparseAttentionModule, dense), namespace)


def _rebuild(dense: Any) -> Any:
    cls = sparse_class(dense)
    return cls.__new__(cls)


@cache
def dense_class(cls: Any) -> Any:
    """The class that `sparse_class` extended. For a class that extends a sparse one: a like one of the dense.

    FSDP2 and torch's parametrizations extend the class of a module, before or after its conversion.

    Raises:
        UnsupportedModel: a method of such a class calls ``super()``, so it can't be given other bases.
    """
    if "dense_class" in cls.__dict__:
        return cls.__dict__["dense_class"]
    if not issubclass(cls, SparseAttentionModule):
        return cls
    namespace = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    tied = [
        name
        for name, value in namespace.items()
        if isinstance(value, FunctionType) and "__class__" in value.__code__.co_freevars
    ]
    if tied:
        got = f"{cls.__name__}, which extends a sparse class and calls super() in {tied[0]}"
        takes = "modules as sparsify left them"
        raise UnsupportedModel(describe("model", got, takes, "Undo that extension first."))
    sparse = next(base for base in cls.__mro__ if "dense_class" in base.__dict__)
    name = cls.__name__.replace(sparse.__name__, sparse.dense_class.__name__)
    return type(name, tuple(dense_class(base) for base in cls.__bases__), namespace)


def _refuse_clashes(name: str, module: nn.Module) -> None:
    """Raises UnsupportedModel where the module has attributes that a sparse one needs for itself."""
    ours = {*SparseAttentionModule.__annotations__, *vars(SparseAttentionModule), "dense_class"}
    clashes = [own for own in sorted(ours) if not own.startswith("_") and hasattr(module, own)]
    if clashes:
        got = f"a {type(module).__name__} with attributes of its own: {', '.join(clashes)}"
        raise UnsupportedModel(describe(name, got, "one without attributes of these names"))


def _privatise_configs(model: nn.Module) -> None:
    """Replaces every configuration of the model by a copy that no other model shares."""
    holders = [
        (module, name, value)
        for module in model.modules()
        for name, value in module.__dict__.items()
        if isinstance(value, PretrainedConfig)
    ]
    # One call, so that configurations within configurations stay the same objects.
    current = copy.deepcopy([value for *_, value in holders])
    pristine = copy.deepcopy(current)
    for (module, name, original), own, copied in zip(holders, current, pristine, strict=True):
        module.__dict__.setdefault(_DENSE_CONFIGS, {})[name] = (original, copied)
        module.__dict__[name] = own


def _replay_edits(
    current: PretrainedConfig, original: PretrainedConfig, copied: PretrainedConfig
) -> None:
    """Carries over what was set on the copy since, except what the conversion itself set."""
    for name, value in current.__dict__.items():
        old, own = copied.__dict__.get(name), original.__dict__.get(name)
        if (
            isinstance(value, PretrainedConfig)
            and isinstance(old, PretrainedConfig)
            and isinstance(own, PretrainedConfig)
        ):
            _replay_edits(value, own, old)
        elif not _set_by_us(name, value) and (name not in copied.__dict__ or old != value):
            original.__dict__[name] = value
    for name in set(copied.__dict__) - set(current.__dict__):
        original.__dict__.pop(name, None)


def _set_by_us(name: str, value: object) -> bool:
    if name in BLOCK_NAMES:
        return is_ours(value)
    return name == "_attn_implementation_internal" and value == ATTENTION_NAME

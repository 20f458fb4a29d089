"""The sparse modules of a model, to be changed one by one or many at a time, all or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from modelopt_sparse.config import SparseAttentionConfig
from modelopt_sparse.convert import configurations
from modelopt_sparse.errors import ConfigError, UnsupportedModel, describe
from modelopt_sparse.integrations.hf_checkpoint import write_block
from modelopt_sparse.models.attention import attention_targets
from modelopt_sparse.modes.apply import applied_modes, check_model, parts_with_modes
from modelopt_sparse.modes.undo import undone_on_failure
from modelopt_sparse.module import SparseAttentionModule
from modelopt_sparse.module_state import module_states, sparse_modules
from modelopt_sparse.patterns import Pattern, check_pattern, matches, pattern_name


def sparsified_parts(model: nn.Module) -> list[tuple[nn.Module, SparseAttentionConfig]]:
    """The modules, of `model` itself and within it, that `sparsify` was called with, and what with.

    Raises:
        UnsupportedModel: a sparse module of `model` is in none of them: its record is out of reach.
    """
    parts = [
        (part, entry.config)
        for _, part in parts_with_modes(model)
        for entry in applied_modes(part)
        if isinstance(entry.config, SparseAttentionConfig)
    ]
    within = {id(module) for part, _ in parts for module in part.modules()}
    if any(id(module) not in within for _, module in sparse_modules(model)):
        got = f"a {type(model).__name__} that is part of a sparse model"
        takes = "the model that was made sparse, or one that contains it"
        raise UnsupportedModel(describe("model", got, takes))
    return parts


def chosen_modules(model: nn.Module, pattern: Pattern) -> dict[str, SparseAttentionModule]:
    """The sparse modules that match a pattern, by name.

    Raises:
        ConfigError: the pattern is not valid or matches no sparse module.
        UnsupportedModel: `model` is only a part of the model that was made sparse.
    """
    check_model(model)
    check_pattern(pattern)
    targets = attention_targets(model).values() if sparsified_parts(model) else ()
    sparse = {
        target.name: target
        for target in targets
        if isinstance(target.module, SparseAttentionModule)
    }
    chosen = {
        name: target.module
        for name, target in sparse.items()
        if isinstance(target.module, SparseAttentionModule) and matches(pattern, target)
    }
    if not chosen:
        names = ", ".join(list(sparse)[:20]) or "none here"
        takes = f"one of the sparse modules: {names}"
        raise ConfigError(describe("pattern", pattern_name(pattern), takes))
    return chosen


@contextmanager
def changed(model: nn.Module) -> Iterator[None]:
    """Modules of `model` may be changed in this block, all or nothing; then what is saved says so too."""
    with undone_on_failure(model, *configurations(model)):
        yield
        for part, config in sparsified_parts(model):
            write_block(part, config, module_states(part))

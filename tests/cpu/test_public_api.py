"""What is public has a docstring and is listed; what isn't valid is refused by name."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import modelopt_sparse as mtsa
from modelopt_sparse import kernels, modes
from tests.cpu import tiny
from tests.cpu.tiny import SKIP, snapshot

PUBLIC = {module.__name__: module for module in (mtsa, kernels, modes)}
NAMES = [(module, name) for module in PUBLIC for name in PUBLIC[module].__all__]
TYPED = (ValueError, TypeError, NotImplementedError)


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_every_public_name_has_a_docstring(module, name):
    value = getattr(PUBLIC[module], name)
    if inspect.isclass(value) or inspect.isfunction(value):
        own = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
        # A dataclass without one gets its signature.
        assert own and not own.startswith(f"{name}(")
    elif not isinstance(value, ModuleType | kernels.Plan):
        assert name in _documented_constants()


@cache
def _documented_constants() -> set[str]:
    """The names, in all files, that a string stands below the assignment of."""
    found = set()
    for path in Path(mtsa.__file__).parent.rglob("*.py"):
        body = ast.parse(path.read_text()).body
        for statement, below in pairwise(body):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if is_text and isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = getattr(statement, "targets", None) or [statement.target]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("module", PUBLIC)
def test_nothing_public_is_missing_from_all(module):
    package = PUBLIC[module]
    public = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }
    assert public <= set(package.__all__)
    assert len(package.__all__) == len(set(package.__all__))


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_every_public_function_declares_its_types(module, name):
    value = getattr(PUBLIC[module], name)
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert signature.return_annotation is not signature.empty
        for parameter in signature.parameters.values():
            assert parameter.annotation is not parameter.empty, parameter.name


def test_every_error_is_one_of_ours_and_a_builtin_one():
    for name in mtsa.__all__:
        error = getattr(mtsa, name)
        if inspect.isclass(error) and issubclass(error, Exception):
            assert issubclass(error, mtsa.SparseAttentionError)
            assert issubclass(error, TYPED) or error is mtsa.SparseAttentionError


NOT_A_MODEL = [None, 5, "model", [], object(), nn.Linear, torch.ones(2)]
OF_A_MODEL = {
    "sparsify": lambda model: mtsa.sparsify(model, SKIP),
    "unsparsify": mtsa.unsparsify,
    "is_attn_sparsified": mtsa.is_attn_sparsified,
    "enable": mtsa.enable_sparse_attention,
    "disable": mtsa.disable_sparse_attention,
    "get_stats": mtsa.get_stats,
    "reset_stats": mtsa.reset_stats,
    "summary": mtsa.print_sparse_attention_summary,
    "export": mtsa.export_sparse_attention_config,
    "modelopt_state": mtsa.modelopt_state,
    "compare": lambda model: mtsa.compare(model, []),
    "restore_from_modelopt_state": lambda model: mtsa.restore_from_modelopt_state(
        model, {"state_version": 1, "modes": []}
    ),
    "save": lambda model: mtsa.save(model, "nowhere"),
    "restore": lambda model: mtsa.restore(model, "nowhere"),
    "apply_mode": lambda model: modes.apply_mode(model, "sparse_attention", SKIP),
}


@pytest.mark.parametrize("function", OF_A_MODEL)
@pytest.mark.parametrize("value", NOT_A_MODEL, ids=lambda value: type(value).__name__)
def test_what_is_no_model_is_refused_by_name(function, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mtsa.ArgumentTypeError, match="model"):
        OF_A_MODEL[function](value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "config", [None, 5, 1.5, b"x", [], object(), nn.Linear(1, 1), {}, {"a": 1}]
)
def test_what_is_no_configuration_is_refused(config):
    model = tiny.tiny_llama()
    before = snapshot(model)
    with pytest.raises(TYPED, match=r"config|sparse_cfg|a: not a key"):
        mtsa.sparsify(model, config)
    assert snapshot(model) == before


def test_a_path_that_leads_nowhere_is_a_file_not_found_error(tmp_path):
    model = tiny.tiny_llama()
    before = snapshot(model)
    for path in (tmp_path / "sparse.json", str(tmp_path / "sparse.yaml")):
        with pytest.raises(FileNotFoundError, match="sparse"):
            mtsa.sparsify(model, path)
    assert snapshot(model) == before


@pytest.mark.parametrize("path", [None, 5, [], b"x", True])
def test_what_is_no_path_is_refused_by_name(path):
    model = mtsa.sparsify(tiny.tiny_llama(), SKIP)
    before = snapshot(model)
    for function in (mtsa.save, mtsa.restore):
        with pytest.raises(mtsa.ArgumentTypeError, match="path"):
            function(model, path)
    assert snapshot(model) == before


@pytest.mark.parametrize("value", [None, 5, "LlamaAttention", dict, nn.Linear(1, 1)])
def test_what_is_no_class_is_not_registered(value):
    with pytest.raises(mtsa.ArgumentTypeError, match="cls"):
        mtsa.register_attention_class(value)
    with pytest.raises(mtsa.ConfigError, match="method"):
        mtsa.register_sparse_method(value)


@pytest.mark.parametrize("console", [5, "out", object()])
def test_what_is_no_console_is_refused(console):
    model = mtsa.sparsify(tiny.tiny_llama(), SKIP)
    with pytest.raises(mtsa.ArgumentTypeError, match="console"):
        mtsa.print_sparse_attention_summary(model, console)

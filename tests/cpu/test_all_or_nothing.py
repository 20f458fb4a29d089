"""A failure at any step of a change leaves the model as it was, to the bit."""

from __future__ import annotations

import sys

import pytest
import torch

import modelopt_sparse as mtsa
from modelopt_sparse import convert
from modelopt_sparse.methods import TritonSkipSoftmax
from modelopt_sparse.module import SparseAttentionModule
from tests.cpu import tiny
from tests.cpu.tiny import FLASH, NM, SKIP, logits, snapshot

# The package has the function of that name.
sparse_mode = sys.modules["modelopt_sparse.sparse_mode"]
sparse_parts = sys.modules["modelopt_sparse.sparse_parts"]
FAILURES = [RuntimeError, KeyboardInterrupt, MemoryError, mtsa.ConfigError]


class Nth:
    """Fails at its nth call; before, it does what it stands in for."""

    def __init__(self, function, n, failure):
        self.function, self.left, self.failure = function, n, failure

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if not self.left:
            raise self.failure("injected")
        return self.function(*args, **kwargs)

    def as_method(self):
        return lambda *args, **kwargs: self(*args, **kwargs)


def _break(monkeypatch, step, failure):
    """Makes one step of a conversion of two modules fail."""
    owner, name, n = {
        "first plan": (TritonSkipSoftmax, "plan", 1),
        "second plan": (TritonSkipSoftmax, "plan", 2),
        "plan, once modules are converted": (TritonSkipSoftmax, "plan", 4),
        "first attach": (SparseAttentionModule, "attach", 1),
        "second attach": (SparseAttentionModule, "attach", 2),
        "class": (convert, "sparse_class", 2),
        "copying configurations": (convert, "_privatise_configs", 1),
        "block": (sparse_mode, "write_block", 1),
        "states": (sparse_mode, "module_states", 1),
        "record": (mtsa.modes.apply, "record", 1),
    }[step]
    broken = Nth(getattr(owner, name), n, failure)
    monkeypatch.setattr(owner, name, broken.as_method())
    return broken


STEPS = [
    "first plan",
    "second plan",
    "plan, once modules are converted",
    "first attach",
    "second attach",
    "class",
    "copying configurations",
    "block",
    "states",
    "record",
]


@pytest.mark.parametrize("start", ["dense", "sparse"])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("step", STEPS)
def test_a_failed_sparsify_changes_nothing(step, failure, start, monkeypatch):
    model = tiny.tiny_llama()
    if start == "sparse":
        mtsa.sparsify(model, NM)
        mtsa.disable_sparse_attention(model, "*layers.0.*")
        model.config.use_cache = False
    before, record = snapshot(model), mtsa.modes.applied_modes(model)
    with monkeypatch.context() as patch:
        broken = _break(patch, step, failure)
        with pytest.raises(failure, match="injected"):
            mtsa.sparsify(model, SKIP)
    assert broken.left == 0
    assert snapshot(model) == before
    assert mtsa.modes.applied_modes(model) is record or record == ()
    if start == "sparse":
        assert [entry["enabled"] for entry in mtsa.get_stats(model).values()] == [False, True]


def test_outputs_are_as_before_a_failure_and_the_next_attempt_works(monkeypatch):
    model = mtsa.sparsify(tiny.tiny_llama(), FLASH)
    expected = logits(model)
    with monkeypatch.context() as patch:
        _break(patch, "second attach", RuntimeError)
        with pytest.raises(RuntimeError):
            mtsa.sparsify(model, SKIP)
    assert torch.equal(logits(model), expected)
    mtsa.sparsify(model, NM)
    assert not torch.equal(logits(model), expected)
    mtsa.unsparsify(model)
    assert torch.equal(logits(model), logits(tiny.tiny_llama()))


def test_a_module_without_a_config_in_the_middle_stops_everything():
    model = tiny.tiny_llama(num_hidden_layers=3)
    del model.model.layers[1].self_attn.config
    before = snapshot(model)
    with pytest.raises(mtsa.UnsupportedModel, match=r"model\.layers\.1\.self_attn"):
        mtsa.sparsify(model, SKIP)
    assert snapshot(model) == before


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_unsparsify_leaves_the_model_sparse(failure, monkeypatch):
    model = mtsa.sparsify(tiny.tiny_llama(), FLASH)
    model.config.use_cache = False
    original = model.__dict__["_dense_configs"]["config"][0]
    before, expected = snapshot(model), logits(model)
    for owner, name, n in (
        (SparseAttentionModule, "detach", 2),
        (sparse_mode, "forget_mode", 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, Nth(getattr(owner, name), n, failure).as_method())
            with pytest.raises(failure):
                mtsa.unsparsify(model)
        # The counts of the forward since are the one difference.
        mtsa.reset_stats(model)
        after = snapshot(model)
        for entry in (*before["modules"].values(), *after["modules"].values()):
            entry[1].pop("stats", None)
        assert after == before
        assert original.use_cache is True
    assert torch.equal(logits(model), expected)
    assert mtsa.unsparsify(model).config.use_cache is False


def test_a_failure_while_disabling_disables_nothing(monkeypatch):
    model = mtsa.sparsify(tiny.tiny_llama(), SKIP)
    before = snapshot(model)
    monkeypatch.setattr(sparse_parts, "write_block", Nth(None, 1, MemoryError))
    with pytest.raises(MemoryError):
        mtsa.disable_sparse_attention(model)
    assert snapshot(model) == before
    assert all(entry["enabled"] for entry in mtsa.get_stats(model).values())


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_restore_changes_nothing(failure, monkeypatch):
    state = mtsa.modelopt_state(mtsa.sparsify(tiny.tiny_llama(), SKIP))
    for step in ("second plan", "second attach", "block"):
        model = tiny.tiny_llama()
        before = snapshot(model)
        with monkeypatch.context() as patch:
            _break(patch, step, failure)
            with pytest.raises((failure, mtsa.StateError)):
                mtsa.restore_from_modelopt_state(model, state)
        assert snapshot(model) == before


def test_a_config_that_another_model_shares_is_not_touched_by_a_failure(monkeypatch):
    config = tiny.tiny_config()
    one, other = (tiny.tiny_llama(config=config) for _ in range(2))
    mtsa.sparsify(one, SKIP)
    one.config.use_cache = False
    before = snapshot(other)
    _break(monkeypatch, "second attach", RuntimeError)
    with pytest.raises(RuntimeError):
        mtsa.sparsify(one, SKIP)
    assert snapshot(other) == before
    assert one.config.use_cache is False

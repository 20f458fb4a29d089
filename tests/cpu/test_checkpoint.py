"""`mtsa.save` and `mtsa.restore`: weights and modes in a folder, whole or not at all."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelopt_sparse as mtsa
from modelopt_sparse.modes import checkpoint
from tests.cpu import tiny
from tests.cpu.tiny import FLASH, SKIP, logits, skipped, snapshot

STATE, WEIGHTS = checkpoint.STATE_FILE, checkpoint.WEIGHTS_FILE


@pytest.fixture
def saved(tmp_path):
    """A folder with a sparse model in it."""
    mtsa.save(mtsa.sparsify(tiny.tiny_llama(), SKIP), tmp_path)
    return tmp_path


def _fresh(**changes):
    """A model of other weights, so that nothing is equal by chance."""
    model = tiny.tiny_llama(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "half disabled"])
def test_a_restored_model_computes_the_same_to_the_bit(enabled, tied, tmp_path):
    model = mtsa.sparsify(tiny.tiny_llama(tie_word_embeddings=tied), FLASH)
    if not enabled:
        mtsa.disable_sparse_attention(model, "*layers.0.*")
    folder = tmp_path / "a" / "b"
    mtsa.save(model, str(folder))
    assert sorted(os.listdir(folder)) == [WEIGHTS, STATE]
    fresh = _fresh(tie_word_embeddings=tied)
    assert mtsa.restore(fresh, folder) is fresh
    assert torch.equal(logits(fresh), logits(model))
    assert skipped(fresh) == skipped(model)
    assert sum(skipped(fresh).values()) > 0
    assert mtsa.modelopt_state(fresh) == mtsa.modelopt_state(model)
    assert len(load_file(folder / WEIGHTS)) == len(list(model.parameters()))
    assert (fresh.lm_head.weight is fresh.model.embed_tokens.weight) is tied


def test_a_dense_model_is_saved_and_restored_too(tmp_path):
    model = tiny.tiny_llama()
    mtsa.save(model, tmp_path)
    fresh = mtsa.restore(_fresh(), tmp_path)
    assert torch.equal(logits(fresh), logits(model))
    assert not mtsa.is_attn_sparsified(fresh)


def test_saving_leaves_the_model_as_it_was(saved):
    model = mtsa.sparsify(tiny.tiny_llama(), SKIP)
    before = logits(model)
    mtsa.save(model, saved)
    assert torch.equal(logits(model), before)
    assert mtsa.is_attn_sparsified(model)


def _fail(*args, **kwargs):
    raise OSError("disk full")


@pytest.mark.parametrize("step", ["save_model", "os.replace", "Path.write_bytes"])
def test_a_failed_save_leaves_the_old_files_and_nothing_else(step, saved, monkeypatch):
    before = {name: (saved / name).read_bytes() for name in os.listdir(saved)}
    owner, name = {
        "save_model": (checkpoint, "save_model"),
        "os.replace": (os, "replace"),
        "Path.write_bytes": (checkpoint.Path, "write_bytes"),
    }[step]
    model = mtsa.sparsify(_fresh(), FLASH)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _fail)
        with pytest.raises(OSError, match="disk full"):
            mtsa.save(model, saved)
    assert {name: (saved / name).read_bytes() for name in os.listdir(saved)} == before


def test_callables_cannot_be_saved_and_nothing_is_written(tmp_path):
    rule = SKIP["sparse_cfg"]["*"]
    model = mtsa.sparsify(tiny.tiny_llama(), {"sparse_cfg": {lambda name, module: True: rule}})
    with pytest.raises(mtsa.ConfigError, match="callable"):
        mtsa.save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_weights_that_are_elsewhere_are_refused(saved, tmp_path):
    model = mtsa.sparsify(tiny.tiny_llama(), SKIP)
    model.lm_head.to("meta")
    with pytest.raises(mtsa.UnsupportedModel, match=r"lm_head\.weight, which is offloaded"):
        mtsa.save(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    offloaded = tiny.tiny_llama()
    offloaded.model.to("meta")
    with pytest.raises(mtsa.UnsupportedModel, match="offloaded"):
        mtsa.restore(offloaded, saved)
    sharded = tiny.tiny_llama()
    sharded.lm_head.weight.full_tensor = lambda: None  # As DTensors have.
    with pytest.raises(mtsa.UnsupportedModel, match="sharded"):
        mtsa.save(sharded, tmp_path / "other")
    odd = tiny.tiny_llama()
    odd.__class__ = type("Odd", (type(odd),), {"get_extra_state": lambda self: "text"})
    with pytest.raises(mtsa.UnsupportedModel, match="a str"):
        mtsa.save(odd, tmp_path / "other")


def _edit_state(folder, edit):
    state = json.loads((folder / STATE).read_text())
    edit(state)
    (folder / STATE).write_text(json.dumps(state))


def _edit_weights(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def _cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


DAMAGES = {
    "state is empty": lambda folder: _cut(folder / STATE, 0),
    "state is cut": lambda folder: _cut(folder / STATE, 300),
    "state is binary": lambda folder: (folder / STATE).write_bytes(b"\xff\xfe\x00"),
    "state is nested": lambda folder: (folder / STATE).write_text("[" * 100_000),
    "state is a list": lambda folder: (folder / STATE).write_text("[]"),
    "state is newer": lambda folder: _edit_state(folder, lambda s: s.update(state_version=3)),
    "state is of another model": lambda folder: _edit_state(
        folder, lambda s: s["modes"][0]["metadata"]["modules"].update(other={})
    ),
    "state has an unknown mode": lambda folder: _edit_state(
        folder, lambda s: s["modes"][0].update(mode="unknown")
    ),
    "weights are empty": lambda folder: _cut(folder / WEIGHTS, 0),
    "weights are cut in the header": lambda folder: _cut(folder / WEIGHTS, 100),
    "weights are cut": lambda folder: _cut(folder / WEIGHTS, 5000),
    "weights are text": lambda folder: (folder / WEIGHTS).write_text("weights" * 9),
    "header claims to be huge": lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 64),
    "a tensor is missing": lambda folder: _edit_weights(
        folder, lambda t: t.pop("model.norm.weight")
    ),
    "a tensor has another shape": lambda folder: _edit_weights(
        folder, lambda t: t.update({"model.norm.weight": torch.ones(3)})
    ),
    "a tensor is unknown": lambda folder: _edit_weights(
        folder, lambda t: t.update({"other": torch.ones(3)})
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(damage, saved):
    DAMAGES[damage](saved)
    model = _fresh()
    before = snapshot(model)
    with pytest.raises(mtsa.StateError):
        mtsa.restore(model, saved)
    assert snapshot(model) == before


def test_an_oversized_state_is_refused_unread(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_STATE_BYTES", 10)
    monkeypatch.setattr(json, "loads", _fail)
    with pytest.raises(mtsa.StateError, match="at most 10"):
        mtsa.restore(tiny.tiny_llama(), saved)


@pytest.mark.parametrize("name", [STATE, WEIGHTS])
def test_a_missing_file_is_a_file_not_found_error(name, saved):
    (saved / name).unlink()
    model = tiny.tiny_llama()
    before = snapshot(model)
    with pytest.raises(FileNotFoundError, match=name):
        mtsa.restore(model, saved)
    with pytest.raises(FileNotFoundError):
        mtsa.restore(model, saved / "nowhere")
    assert snapshot(model) == before


def test_a_model_of_another_shape_is_refused(saved):
    for model in (
        tiny.tiny_llama(intermediate_size=48),
        tiny.tiny_llama(num_hidden_layers=3),
        tiny.tiny_llama(num_hidden_layers=1),
    ):
        before = snapshot(model)
        with pytest.raises(mtsa.StateError):
            mtsa.restore(model, saved)
        assert snapshot(model) == before


def test_a_sparse_model_is_not_restored_over(saved):
    model = mtsa.sparsify(_fresh(), FLASH)
    before = snapshot(model)
    with pytest.raises(mtsa.StateError, match="Undo"):
        mtsa.restore(model, saved)
    assert snapshot(model) == before

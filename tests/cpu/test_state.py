"""`modelopt_state` and `restore_from_modelopt_state`: everything that changes the output, checked."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import modelopt_sparse as mtsa
from modelopt_sparse.kernels.types import Plan, SkipSoftmax
from modelopt_sparse.methods import TritonSkipSoftmax
from tests.cpu import tiny
from tests.cpu.tiny import ATTENTION, FLASH, NM, SKIP, config_of, logits, snapshot


def _entry(model, **changes):
    state = mtsa.modelopt_state(model)
    state["modes"][0].update(changes)
    return state


def test_state_survives_json_and_is_a_copy():
    model = mtsa.sparsify(tiny.tiny_llama(), FLASH)
    state = mtsa.modelopt_state(model)
    assert json.loads(json.dumps(state)) == state
    untouched = copy.deepcopy(state)
    state["modes"][0]["metadata"]["modules"].clear()
    assert mtsa.modelopt_state(model) == untouched
    assert state["producer"]["name"] == "modelopt_sparse"


STATES = {
    "method": (SKIP, lambda model: mtsa.sparsify(model, NM)),
    "fields": (FLASH, lambda model: mtsa.sparsify(model, _flash(br=32))),
    "threshold": (FLASH, lambda model: mtsa.sparsify(model, _flash(prefill=0.001))),
    "enabled": (FLASH, lambda model: mtsa.disable_sparse_attention(model, "*layers.1.*")),
    "modules": (FLASH, lambda model: mtsa.sparsify(model, _only("*layers.0.*"))),
}


def _flash(br=16, prefill=0.1):
    thresholds = {"prefill": [prefill], "decode": [0.1]}
    return config_of("flash_skip_softmax", thresholds=thresholds, br=br, bc=16)


def _only(pattern):
    return {"sparse_cfg": {pattern: FLASH["sparse_cfg"]["*"]}}


@pytest.mark.parametrize("what", STATES)
def test_everything_that_changes_the_output_is_in_the_state(what):
    config, change = STATES[what]
    model = mtsa.sparsify(tiny.tiny_llama(), config)
    saved, expected = json.dumps(mtsa.modelopt_state(model)), logits(model)
    change(model)
    changed, other = json.dumps(mtsa.modelopt_state(model)), logits(model)
    assert not torch.equal(other, expected)
    for state, out in ((saved, expected), (changed, other)):
        restored = mtsa.restore_from_modelopt_state(tiny.tiny_llama(), json.loads(state))
        assert torch.equal(logits(restored), out)
        assert json.dumps(mtsa.modelopt_state(restored)) == state


def test_decision_tiles_of_another_version_are_refused(monkeypatch):
    state = mtsa.modelopt_state(mtsa.sparsify(tiny.tiny_llama(), SKIP))
    tiles = {"prefill": [64, 128], "decode": [4096, 64]}
    assert state["modes"][0]["metadata"]["modules"][ATTENTION[0]]["decision_tiles"] == tiles
    monkeypatch.setattr(TritonSkipSoftmax, "plan", lambda self: Plan(skip=SkipSoftmax(0.1, 32, 32)))
    model = tiny.tiny_llama()
    before = snapshot(model)
    with pytest.raises(mtsa.StateError, match="decision_tiles"):
        mtsa.restore_from_modelopt_state(model, state)
    assert snapshot(model) == before


def _module(**changes):
    entry = {"enable": True, "fields": {"method": "triton_skip_softmax"}, "decision_tiles": {}}
    return {"modules": {ATTENTION[0]: entry | changes}}


BROKEN = {
    "no mapping": None,
    "a list": [],
    "no version": {"modes": []},
    "version 0": {"state_version": 0, "modes": []},
    "version true": {"state_version": True, "modes": []},
    "version text": {"state_version": "1", "modes": []},
    "no modes": {"state_version": 1},
    "a mode that is text": {"state_version": 1, "modes": ["sparse_attention"]},
    "a mode without metadata": {"state_version": 1, "modes": [{"mode": "x", "config": {}}]},
}
CHANGED = {
    "unknown mode": {"mode": "unknown"},
    "mode 5": {"mode": 5},
    "config none": {"config": None},
    "config empty": {"config": {}},
    "metadata empty": {"metadata": {}},
    "metadata none": {"metadata": None},
    "modules a list": {"metadata": {"modules": []}},
    "unknown module": {"metadata": {"modules": {"model.layers.7.self_attn": {}}}},
    "empty module": {"metadata": {"modules": {ATTENTION[0]: {}}}},
    "module none": {"metadata": {"modules": {ATTENTION[0]: None}}},
    "enable 1": {"metadata": _module(enable=1)},
    "fields none": {"metadata": _module(fields=None)},
    "unknown method": {"metadata": _module(fields={"method": "unknown"})},
    "threshold 7": {
        "metadata": _module(fields={"method": "triton_skip_softmax", "skip_softmax_threshold": 7})
    },
    "unknown field": {"metadata": _module(fields={"method": "triton_skip_softmax", "other": 1})},
    "tiles 5": {"metadata": _module(decision_tiles=5)},
    "other tiles": {"metadata": _module(decision_tiles={"prefill": [64, 64]})},
}


@pytest.mark.parametrize("what", [*BROKEN, *CHANGED])
def test_a_broken_state_is_refused_and_changes_nothing(what):
    if what in BROKEN:
        state = BROKEN[what]
    else:
        state = _entry(mtsa.sparsify(tiny.tiny_llama(), SKIP), **CHANGED[what])
    model = tiny.tiny_llama()
    before = snapshot(model)
    with pytest.raises(mtsa.StateError):
        mtsa.restore_from_modelopt_state(model, state)
    assert snapshot(model) == before


def test_a_newer_state_is_refused_with_what_to_do():
    with pytest.raises(mtsa.StateError, match="Update modelopt_sparse"):
        mtsa.restore_from_modelopt_state(nn.Linear(2, 2), {"state_version": 3, "modes": []})


def test_a_state_is_restored_on_an_unconverted_model_only():
    model = mtsa.sparsify(tiny.tiny_llama(), SKIP)
    state = mtsa.modelopt_state(model)
    before = snapshot(model)
    with pytest.raises(mtsa.StateError, match="Undo them first"):
        mtsa.restore_from_modelopt_state(model, state)
    assert snapshot(model) == before
    part = tiny.tiny_llama()
    mtsa.sparsify(part.model, SKIP)
    with pytest.raises(mtsa.StateError, match="Undo them first"):
        mtsa.restore_from_modelopt_state(part, state)
    mtsa.restore_from_modelopt_state(mtsa.unsparsify(model), state)


def test_the_state_of_a_dense_model_restores_a_dense_model():
    state = mtsa.modelopt_state(tiny.tiny_llama())
    assert state["modes"] == []
    assert not mtsa.is_attn_sparsified(mtsa.restore_from_modelopt_state(tiny.tiny_llama(), state))

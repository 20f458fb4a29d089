"""What `sparsify` takes, what it does to a model, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

import modelopt_sparse as mtsa
from modelopt_sparse.kernels.types import NMSparsity
from tests.cpu import tiny
from tests.cpu.tiny import ATTENTION, FLASH, NM, SKIP, config_of, logits, skipped, snapshot

README = {
    "sparse_cfg": {
        "*attn*": {
            "method": "triton_sparse_softmax",
            "sparsity_n": 2,
            "sparsity_m": 4,
            "num_sink_tokens": 4,
            "dense_window_size": 128,
            "backend": "triton",
            "enable": True,
        },
        "*layers.{0,1}.*": {"enable": False},
        "default": {"enable": False},
    }
}


@pytest.fixture
def calls(monkeypatch):
    return tiny.KernelCalls(monkeypatch)


@pytest.mark.parametrize("preset", [name for name in mtsa.PRESETS if "calib" not in name])
def test_each_preset_changes_the_output(preset, calls):
    model = tiny.tiny_llama()
    dense = logits(model)
    assert mtsa.sparsify(model, mtsa.PRESETS[preset]) is model
    out = logits(model)
    assert not torch.equal(out, dense)
    assert len(calls) == 2
    if "sparse_softmax" in preset:
        assert all(plan.nm == NMSparsity(2, 4, 0, 64) for plan in calls)
    if "skip" in preset:
        assert all(count > 0 for count in skipped(model).values())
        assert {plan.skip.threshold for plan in calls} == {0.1}
    backend = "attention_reference" if "flash" in preset else "attention_varlen"
    assert calls.entries == [backend] * 2


def test_a_configuration_written_as_a_dict_leaves_out_the_layers_that_a_later_rule_disables(calls):
    model = tiny.tiny_llama(num_hidden_layers=3)
    dense = logits(model)
    mtsa.sparsify(model, README)
    out = logits(model)
    assert not torch.equal(out, dense)
    assert [plan.nm for plan in calls] == [None, None, NMSparsity(2, 4, 4, 128)]
    assert [entry["enabled"] for entry in mtsa.get_stats(model).values()] == [False, False, True]


def _as_object(config, folder):
    return mtsa.SparseAttentionConfig.load(config)


def _as_json(config, folder):
    path = folder / "sparse.json"
    path.write_text(json.dumps(config))
    return path


def _as_yaml(config, folder):
    path = folder / "sparse.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return str(path)


@pytest.mark.parametrize("form", [_as_object, _as_json, _as_yaml])
def test_every_form_of_a_configuration_does_the_same(form, tmp_path):
    expected = logits(mtsa.sparsify(tiny.tiny_llama(), FLASH))
    model = mtsa.sparsify(tiny.tiny_llama(), form(FLASH, tmp_path))
    assert torch.equal(logits(model), expected)
    assert all(count > 0 for count in skipped(model).values())


def test_a_callable_pattern_chooses_modules():
    model = tiny.tiny_llama()
    seen = []

    def second(name, module):
        seen.append((name, type(module).__name__))
        return module.layer_idx == 1

    mtsa.sparsify(model, {"sparse_cfg": {second: FLASH["sparse_cfg"]["*"]}})
    logits(model)
    assert set(seen) == {(name, "LlamaAttention") for name in ATTENTION}
    assert list(skipped(model)) == [ATTENTION[1]]
    assert skipped(model)[ATTENTION[1]] > 0


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("triton_skip_softmax", [{"skip_softmax_threshold": t} for t in (0.1, 1e-3, 1e-9)]),
        ("flash_skip_softmax", [{"thresholds": {"prefill": [t]}} for t in (0.1, 1e-3, 1e-9)]),
        ("flash_skip_softmax", [{"br": 16, "bc": 16}, {"br": 16, "bc": 32}, {"br": 32, "bc": 16}]),
    ],
    ids=["threshold", "thresholds", "tiles"],
)
def test_counts_move_as_the_knob_does(method, fields):
    counts = []
    for changed in fields:
        model = mtsa.sparsify(tiny.tiny_llama(), config_of(method, **changed))
        logits(model)
        counts.append(sum(skipped(model).values()))
    assert len(set(counts)) == len(counts)
    assert max(counts) == counts[0] > 0


@pytest.mark.parametrize(
    "changed",
    [{"sparsity_n": 1}, {"sparsity_m": 8}, {"num_sink_tokens": 40}, {"dense_window_size": 200}],
    ids=lambda changed: next(iter(changed)),
)
def test_every_knob_of_sparse_softmax_changes_the_output(changed):
    usual = logits(mtsa.sparsify(tiny.tiny_llama(), NM))
    other = config_of("triton_sparse_softmax", **{"dense_window_size": 16, **changed})
    assert not torch.equal(logits(mtsa.sparsify(tiny.tiny_llama(), other)), usual)


def test_decode_skips_only_with_a_decode_threshold():
    prefill_only = config_of("triton_skip_softmax", skip_softmax_threshold=0.1)
    model = mtsa.sparsify(tiny.tiny_llama(), prefill_only)
    dense_decode = tiny.generate(model)
    assert all(count > 0 for count in skipped(model).values())
    assert all(entry["decode"] is None for entry in mtsa.get_stats(model).values())
    mtsa.sparsify(model, SKIP)
    out = tiny.generate(model)
    assert torch.equal(out[0], dense_decode[0])
    assert not torch.equal(out[1:], dense_decode[1:])
    assert all(count > 0 for count in skipped(model, "decode").values())


def test_a_sparse_model_keeps_its_weights_keys_and_isinstance_relations():
    model = tiny.tiny_llama()
    before = snapshot(model)
    mtsa.sparsify(model, SKIP)
    after = snapshot(model)
    assert (after["tensors"], after["values"]) == (before["tensors"], before["values"])
    for name in ATTENTION:
        module = model.get_submodule(name)
        assert isinstance(module, before["modules"][name][0])
        assert isinstance(module, mtsa.SparseAttentionModule)
        assert type(module).__name__ == "SparseLlamaAttention"
        assert "forward" not in vars(type(module))
    assert type(model.get_submodule(ATTENTION[0])) is type(model.get_submodule(ATTENTION[1]))
    assert mtsa.is_attn_sparsified(model)


def test_a_pattern_that_matches_nothing_is_refused_with_the_candidates_and_changes_nothing():
    model = tiny.tiny_llama()
    before, dense = snapshot(model), logits(model)
    rule = SKIP["sparse_cfg"]["*"]
    with pytest.raises(mtsa.ConfigError) as caught:
        mtsa.sparsify(model, {"sparse_cfg": {"*attn*": rule, "*cross_attention*": rule}})
    assert all(text in str(caught.value) for text in ("'*cross_attention*'", *ATTENTION))
    assert snapshot(model) == before
    assert torch.equal(logits(model), dense)
    assert model.config._attn_implementation == "sdpa"


def test_a_configuration_that_gives_no_module_a_method_is_refused_and_changes_nothing():
    model = tiny.tiny_llama()
    before = snapshot(model)
    with pytest.raises(mtsa.ConfigError, match="sparse_cfg"):
        mtsa.sparsify(model, {"sparse_cfg": {"default": {"enable": False}}})
    assert snapshot(model) == before


def test_a_model_without_the_attention_interface_is_refused():
    model = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2))
    before = snapshot(model)
    with pytest.raises(mtsa.UnsupportedModel, match="BloomForCausalLM"):
        mtsa.sparsify(model, SKIP)
    assert snapshot(model) == before
    with pytest.raises(NotImplementedError, match="Linear"):
        mtsa.sparsify(nn.Linear(2, 2), SKIP)


def test_a_model_that_selects_keys_itself_is_refused():
    model = tiny.tiny_llama()
    model.config.model_type = "deepseek_v32"
    with pytest.raises(mtsa.UnsupportedModel, match="deepseek_v32"):
        mtsa.sparsify(model, SKIP)
    assert not mtsa.is_attn_sparsified(model)

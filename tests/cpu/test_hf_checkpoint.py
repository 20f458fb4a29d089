"""`save_pretrained` writes what a sparse model does, `mtsa.from_pretrained` reads it back."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import modelopt_sparse as mtsa
from tests.cpu import tiny
from tests.cpu.tiny import ATTENTION, FLASH, SKIP, logits, skipped, snapshot

RULE = FLASH["sparse_cfg"]["*"]
# The order matters: in that of the alphabet, "*layers*" would come last and enable every module.
ORDERED = {
    "sparse_cfg": {
        "default": {"enable": False},
        "*layers*": RULE,
        "*attn": {"enable": False},
        "*1.self_attn": {"enable": True},
    }
}
BLOCK, OTHER_BLOCK = "sparse_attention_config", "modelopt_sparse_attention_config"


def _config_json(folder):
    return json.loads((folder / "config.json").read_text())


def _edit(folder, edit, name=BLOCK):
    config = _config_json(folder)
    edit(config[name])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def saved(tmp_path):
    """A folder in which ``save_pretrained`` wrote a sparse model."""
    mtsa.sparsify(tiny.tiny_llama(), ORDERED).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, LlamaForCausalLM])
def test_a_loaded_model_computes_the_same_to_the_bit(auto_class, saved):
    model = mtsa.sparsify(tiny.tiny_llama(), ORDERED)
    loaded = mtsa.from_pretrained(auto_class, saved, dtype=torch.float32)
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(logits(loaded), logits(model))
    assert skipped(loaded) == skipped(model)
    assert skipped(loaded)[ATTENTION[1]] > 0
    enabled = [entry["enabled"] for entry in mtsa.get_stats(loaded).values()]
    assert enabled == [False, True]


def test_the_order_of_rules_survives(saved):
    loaded = mtsa.from_pretrained(LlamaForCausalLM, saved)
    (entry,) = mtsa.modes.applied_modes(loaded)
    assert list(entry.config.sparse_cfg) == list(ORDERED["sparse_cfg"])
    assert entry.config == mtsa.SparseAttentionConfig.load(ORDERED)
    again = mtsa.sparsify(tiny.tiny_llama(), entry.config)
    assert torch.equal(logits(loaded), logits(again))


@pytest.mark.parametrize("change", [mtsa.disable_sparse_attention, mtsa.enable_sparse_attention])
def test_what_was_enabled_since_survives(change, tmp_path):
    model = change(mtsa.sparsify(tiny.tiny_llama(), ORDERED), "*layers.{0,1}.*")
    model.save_pretrained(tmp_path)
    loaded = mtsa.from_pretrained(LlamaForCausalLM, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert [entry["enabled"] for entry in mtsa.get_stats(loaded).values()] == [
        change is mtsa.enable_sparse_attention
    ] * 2
    mtsa.disable_sparse_attention(loaded)
    loaded.save_pretrained(tmp_path)
    again = mtsa.from_pretrained(LlamaForCausalLM, tmp_path)
    assert not any(entry["enabled"] for entry in mtsa.get_stats(again).values())


def test_callables_are_written_as_the_names_that_they_matched(tmp_path):
    def last(name, module):
        return name.endswith("1.self_attn")

    model = mtsa.sparsify(tiny.tiny_llama(), {"sparse_cfg": {last: RULE}})
    model.save_pretrained(tmp_path)
    loaded = mtsa.from_pretrained(LlamaForCausalLM, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert list(mtsa.get_stats(loaded)) == [ATTENTION[1]]


def test_the_checkpoint_loads_dense_without_the_package(saved):
    program = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(saved)!r}).eval()
assert "modelopt_sparse" not in sys.modules
assert model.config._attn_implementation == "sdpa"
with torch.no_grad():
    torch.save(model(torch.load({str(saved / "ids.pt")!r})).logits, {str(saved / "out.pt")!r})
"""
    torch.save(tiny.prompt(), saved / "ids.pt")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, cwd=saved)
    dense = logits(tiny.tiny_llama())
    assert torch.allclose(torch.load(saved / "out.pt"), dense, atol=1e-5)
    assert not torch.allclose(logits(mtsa.sparsify(tiny.tiny_llama(), ORDERED)), dense, atol=1e-3)


def test_after_unsparsify_the_checkpoint_has_no_block(saved):
    loaded = mtsa.unsparsify(mtsa.from_pretrained(LlamaForCausalLM, saved))
    assert torch.equal(logits(loaded), logits(tiny.tiny_llama()))
    loaded.save_pretrained(saved)
    assert BLOCK not in _config_json(saved)
    with pytest.raises(mtsa.StateError, match="no sparse_attention_config block"):
        mtsa.from_pretrained(LlamaForCausalLM, saved)


def test_a_block_that_a_model_family_owns_is_not_overwritten(tmp_path):
    theirs = {"use_sparse_attention": True, "block_size": 16}
    config = tiny.tiny_config(**{BLOCK: theirs})
    model = mtsa.sparsify(tiny.tiny_llama(config=config), ORDERED)
    assert model.config.sparse_attention_config == theirs
    model.save_pretrained(tmp_path)
    written = _config_json(tmp_path)
    assert written[BLOCK] == theirs
    assert written[OTHER_BLOCK]["producer"]["name"] == "modelopt_sparse"
    loaded = mtsa.from_pretrained(LlamaForCausalLM, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    mtsa.unsparsify(model)
    assert model.config.sparse_attention_config == theirs
    assert not hasattr(model.config, OTHER_BLOCK)


def test_an_edit_of_a_block_that_a_model_family_owns_survives():
    config = tiny.tiny_config(**{BLOCK: {"block_size": 16}})
    model = mtsa.sparsify(tiny.tiny_llama(config=config), SKIP)
    model.config.sparse_attention_config["block_size"] = 32
    mtsa.unsparsify(model)
    assert model.config.sparse_attention_config == {"block_size": 32}


def test_the_config_alone_round_trips(saved):
    config = AutoConfig.from_pretrained(saved)
    assert config.sparse_attention_config["block_version"] == 2
    assert mtsa.sparsify(tiny.tiny_llama(config=config), SKIP) is not None


MALFORMED = {
    "no config": lambda block: block.pop("config"),
    "no metadata": lambda block: block.pop("metadata"),
    "config none": lambda block: block.update(config=None),
    "rules none": lambda block: block["config"].update(sparse_cfg=None),
    "rules of wrong length": lambda block: block["config"].update(sparse_cfg=[["*"]]),
    "unknown key": lambda block: block["config"].update(other=1),
    "unknown method": lambda block: block["config"].update(sparse_cfg=[["*", {"method": "x"}]]),
    "metadata none": lambda block: block.update(metadata=None),
    "metadata empty": lambda block: block.update(metadata={}),
    "unknown module": lambda block: block["metadata"]["modules"].update(other={}),
    "no version": lambda block: block.pop("block_version"),
    "version text": lambda block: block.update(block_version="1"),
    "newer": lambda block: block.update(block_version=3),
    "no producer": lambda block: block.pop("producer"),
    "another producer": lambda block: block.update(producer={"name": "other"}),
    "producer text": lambda block: block.update(producer="modelopt_sparse"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_block_is_a_state_error(what, saved):
    _edit(saved, MALFORMED[what])
    with pytest.raises(mtsa.StateError):
        mtsa.from_pretrained(LlamaForCausalLM, saved)


def test_arguments_reach_the_loader(saved):
    loaded, info = mtsa.from_pretrained(
        LlamaForCausalLM, saved, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert mtsa.is_attn_sparsified(loaded)
    before = logits(loaded)
    assert mtsa.unsparsify(loaded).config._attn_implementation == "eager"
    assert not torch.equal(logits(loaded), before)


@pytest.mark.parametrize("auto_class", [None, 5, "AutoModel", dict])
def test_a_class_that_loads_nothing_is_refused(auto_class, saved):
    with pytest.raises(mtsa.ArgumentTypeError, match="auto_class"):
        mtsa.from_pretrained(auto_class, saved)


@pytest.mark.parametrize("path", [None, 5, [], b"x"])
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises(mtsa.ArgumentTypeError, match="path"):
        mtsa.from_pretrained(LlamaForCausalLM, path)


def test_a_model_within_a_plain_module_has_no_block_and_works():
    model = torch.nn.Sequential(tiny.tiny_llama())
    before = snapshot(model)
    mtsa.sparsify(model, SKIP)
    assert not hasattr(model[0].config, BLOCK)
    assert mtsa.is_attn_sparsified(model)
    mtsa.unsparsify(model)
    assert snapshot(model) == before

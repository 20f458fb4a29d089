"""Schema versions: what the first version wrote loads, what a newer one writes is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import modelopt_sparse as mtsa
from modelopt_sparse.errors import StateError
from modelopt_sparse.integrations import hf_checkpoint
from modelopt_sparse.modes import checkpoint, state, versions
from tests.cpu import tiny
from tests.cpu.tiny import ATTENTION, logits

# What version 1 wrote of a model that is sparse by `RULES`: its state, and its block in config.json.
VERSION_1 = json.loads((Path(__file__).parent / "data" / "version_1.json").read_text())
FLASH = {"method": "flash_skip_softmax", "thresholds": {"prefill": [0.1, 0.01]}, "br": 16, "bc": 16}
RULES = {
    "default": {"enable": False},
    "*layers.0*": {
        "method": "triton_skip_softmax",
        "skip_softmax_threshold": 0.1,
        "skip_softmax_decode_threshold": 0.2,
    },
    "*layers.1*": FLASH,
    "*1.self_attn": {"enable": False},
}


def _is_as_it_was(model):
    now = mtsa.sparsify(tiny.tiny_llama(), {"sparse_cfg": RULES})
    assert mtsa.modelopt_state(model) == mtsa.modelopt_state(now)
    assert torch.equal(logits(model), logits(now))
    assert [entry["enabled"] for entry in mtsa.get_stats(model).values()] == [True, False]
    mtsa.enable_sparse_attention(model)
    assert torch.equal(logits(model), logits(mtsa.enable_sparse_attention(now)))


def test_a_state_of_version_1_loads():
    assert VERSION_1["state"]["state_version"] == 1
    _is_as_it_was(mtsa.restore_from_modelopt_state(tiny.tiny_llama(), VERSION_1["state"]))


def test_a_saved_folder_of_version_1_loads(tmp_path):
    mtsa.save(tiny.tiny_llama(), tmp_path)
    (tmp_path / checkpoint.STATE_FILE).write_text(json.dumps(VERSION_1["state"], indent=2))
    _is_as_it_was(mtsa.restore(tiny.tiny_llama(), tmp_path))


def test_a_checkpoint_of_version_1_loads(tmp_path):
    tiny.tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["sparse_attention_config"] = VERSION_1["block"]
    assert config["sparse_attention_config"]["block_version"] == 1
    (tmp_path / "config.json").write_text(json.dumps(config, sort_keys=True))
    _is_as_it_was(mtsa.from_pretrained(LlamaForCausalLM, tmp_path))


def test_what_is_written_says_version_2():
    model = mtsa.sparsify(tiny.tiny_llama(), {"sparse_cfg": RULES})
    assert mtsa.modelopt_state(model)["state_version"] == state.STATE_VERSION == 2
    block = model.config.sparse_attention_config
    assert block["block_version"] == hf_checkpoint.BLOCK_VERSION == 2


def _renamed(content):
    return {"new": content["old"]}


def test_steps_lead_from_any_version_to_the_newest():
    steps = {1: versions.unchanged, 2: _renamed, 3: lambda content: {"newest": content["new"]}}
    assert versions.newest(steps) == 4
    for version in (1, 2):
        found = versions.up_to_date("", {"v": version, "old": 5}, "v", steps)
        assert found == {"newest": 5}
    assert versions.up_to_date("", {"v": 3, "new": 5}, "v", steps) == {"newest": 5}
    assert versions.up_to_date("", {"v": 4, "newest": 5}, "v", steps)["newest"] == 5


@pytest.mark.parametrize("version", [5, 10**6, 10**5000], ids=["5", "million", "huge"])
def test_a_newer_version_is_refused_with_what_to_do(version):
    steps = dict.fromkeys((1, 2, 3), versions.unchanged)
    with pytest.raises(StateError, match=r"a\.v: got .*takes at most 4\. Update modelopt_sparse"):
        versions.up_to_date("a.", {"v": version}, "v", steps)


@pytest.mark.parametrize(
    "version", [None, 0, -1, True, 1.0, "1", [1], "x" * 10**6], ids=lambda v: repr(v)[:9]
)
def test_what_is_no_version_is_refused(version):
    with pytest.raises(StateError, match="takes an int from 1 to 2") as refusal:
        versions.up_to_date("", {"v": version}, "v", {1: versions.unchanged})
    assert len(str(refusal.value)) < 300


def test_the_fixture_names_the_modules_of_the_tiny_model():
    modules = VERSION_1["state"]["modes"][0]["metadata"]["modules"]
    assert tuple(modules) == ATTENTION

"""Files made to do harm: each is refused, soon, by a typed error, and the model is as before."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import modelopt_sparse as mtsa
from modelopt_sparse.config import SparseAttentionConfig
from modelopt_sparse.config.files import MAX_YAML_BYTES
from modelopt_sparse.config.parsing import MAX_GLOBS, MAX_RULES
from modelopt_sparse.patterns import Target
from tests.cpu import tiny
from tests.cpu.hostile import CALIBRATED, SKIP, STATE, WEIGHTS, saved_files, sparse_model
from tests.cpu.tiny import ATTENTION, config_of, snapshot


@pytest.fixture(scope="module")
def sparse():
    return sparse_model()


@pytest.fixture(scope="module")
def model():
    """A dense model; whoever makes it sparse makes it dense again."""
    return tiny.tiny_llama()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_files(tmp_path_factory.mktemp("saved"))


def _bomb(item, times=9, levels=9):
    rows = [f"a0: &a0 {item}"]
    rows += [f"a{n}: &a{n} {_times(f'*a{n - 1}', times, item)}" for n in range(1, levels)]
    return "\n".join(rows)


def _times(name, times, item):
    names = ", ".join([name] * times)
    return f"{{<<: [{names}]}}" if item.startswith("{") else f"[{names}]"


def _rules(number, pattern="*a{}"):
    rules = {pattern.replace("{}", str(n)): {"enable": False} for n in range(number)}
    return json.dumps({"sparse_cfg": {"*": {"method": SKIP}, **rules}})


BOMBS = {
    "merges of merges": ("yaml", _bomb("{x: 1}"), "more keys"),
    "lists of lists": ("yaml", _bomb("[x]"), "not a key"),
    "a number in base 60": ("yaml", "a: 1" + ":1" * 60_000, ""),
    "much YAML": ("yaml", "a: 1\n" * MAX_YAML_BYTES, f"at most {MAX_YAML_BYTES}"),
    "empty int": ("yaml", "!!int ''", "well-formed YAML"),
    "no bool": ("yaml", "!!bool x", "well-formed YAML"),
    "no timestamp": ("yaml", "!!timestamp x", "well-formed YAML"),
    "many rules": ("json", _rules(MAX_RULES), f"at most {MAX_RULES}"),
    "a million rules": ("json", _rules(10**6), "at most"),
    "many globs": ("json", _rules(9, "*{}{0..4095}"), f"more than {MAX_GLOBS}"),
    "braces": ("json", _rules(1, "{a,b}" * 800), "expansions"),
    "long expansions": ("json", _rules(200, "{}" + "{a,b}" * 9 + "x" * 4000), "characters"),
    "deep braces": ("json", _rules(1, "{" * 4000), "deep"),
    "a long pattern": ("json", _rules(1, "x" * 5000), "characters"),
    "deep rules": ("json", '{"sparse_cfg": {"*": {"br": ' + "[" * 900 + "]" * 900 + "}}}", "br"),
    "a huge table": (
        "json",
        json.dumps(
            config_of(
                SKIP, skip_softmax_threshold={**CALIBRATED, "table": {"lengths": [1] * 10**5}}
            )
        ),
        "calibrated",
    ),
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_file_that_would_take_long_is_refused_soon(what, tmp_path):
    suffix, text, says = BOMBS[what]
    path = tmp_path / f"c.{suffix}"
    path.write_text(text)
    start = time.process_time()
    with pytest.raises(mtsa.ConfigError) as refusal:
        SparseAttentionConfig.load(path)
    assert time.process_time() - start < 10
    assert says in str(refusal.value)
    assert len(str(refusal.value)) < 2000


def test_the_slowest_patterns_that_are_taken_match_soon():
    rules = {f"*{n}{{0..4000}}*x": {"enable": False} for n in range(3)}
    rules |= {("*a" * 2000)[n:] + "b": {"enable": False} for n in range(20)}
    config = SparseAttentionConfig(sparse_cfg={"*": {"method": SKIP}, **rules})
    targets = [Target("a" * 100 + str(n), "", None) for n in range(50)]
    start = time.process_time()
    config.matching(targets)
    with pytest.raises(mtsa.ConfigError, match="no attention module"):
        config.resolve_all(targets)
    assert time.process_time() - start < 20


def _in_place_of(path, kind):
    if path.exists():
        path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path.name)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to itself"])
@pytest.mark.parametrize("name", [STATE, WEIGHTS, "config.json", "c.yaml"])
def test_what_is_no_file_is_refused_and_not_waited_for(kind, name, saved, model, tmp_path):
    for own in (STATE, WEIGHTS, "config.json"):
        (tmp_path / own).write_bytes(saved[own])
    _in_place_of(tmp_path / name, kind)
    error = FileNotFoundError if kind == "link to itself" else mtsa.StateError
    if name in (STATE, WEIGHTS):
        with pytest.raises(error):
            mtsa.restore(model, tmp_path)
        return
    if name == "config.json":
        with pytest.raises(error):
            mtsa.from_pretrained(LlamaForCausalLM, tmp_path)
        error = mtsa.ConfigError if error is mtsa.StateError else error
        with pytest.raises(error):
            SparseAttentionConfig.from_checkpoint(tmp_path)
    error = mtsa.ConfigError if error is mtsa.StateError else error
    with pytest.raises(error):
        SparseAttentionConfig.load(tmp_path / name)


STATES = {
    "a rule twice": lambda state: state.update(modes=state["modes"] * 101),
    "a table of one row": lambda state: _fields(state)["thresholds"].update(
        prefill=[{**CALIBRATED, "table": {**CALIBRATED["table"], "factors": [[1.0]]}}]
    ),
    "keys beyond int32": lambda state: _fields(state)["thresholds"].update(
        prefill=[{**CALIBRATED, "table": {**CALIBRATED["table"], "lengths": [1, 2**31]}}]
    ),
    "min_context beyond int32": lambda state: _fields(state).update(min_context=2**31),
    "an unknown method": lambda state: _fields(state).update(method="x" * 10**6),
    "a huge number": lambda state: _fields(state).update(br=10**5000),
    "unknown metadata of a module": lambda state: _module(state).update(attn_implementation="x"),
    "another implementation": lambda state: state["modes"][0]["config"].update(
        attn_implementation="eager"
    ),
    "a factor of 0": lambda state: _fields(state)["thresholds"].update(
        prefill=[{"target_sparsity": 0.5, "formula": {"a": 1e-300, "b": -1e300}}]
    ),
    "a key that is a number": lambda state: state["modes"][0]["config"].update({5: 6}),
    "a module that is none": lambda state: state["modes"][0]["metadata"]["modules"].update(
        {"model.norm": _module(state)}
    ),
}


def _module(state):
    return state["modes"][0]["metadata"]["modules"][ATTENTION[0]]


def _fields(state):
    return _module(state)["fields"]


@pytest.mark.parametrize("what", STATES)
def test_a_state_that_no_model_has_is_refused(what, sparse, model):
    state = mtsa.modelopt_state(sparse)
    STATES[what](state)
    before = snapshot(model)
    with pytest.raises(mtsa.StateError) as refusal:
        mtsa.restore_from_modelopt_state(model, state)
    assert snapshot(model) == before
    assert len(str(refusal.value)) < 2000


def test_a_state_that_is_short_and_fills_memory_is_refused(saved, model, tmp_path):
    (tmp_path / STATE).write_text("[" + "[]," * 11_000_000 + "[]]")
    with pytest.raises(mtsa.StateError, match="values"):
        mtsa.restore(model, tmp_path)


def _checkpoint(saved, folder, **changes):
    (folder / WEIGHTS).write_bytes(saved["hf"])
    config = json.loads(saved["config.json"]) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "eager"},
        {"_attn_implementation": "someone/kernel"},
        {"text_config": [{"attn_implementation": "eager"}]},
        {"_experts_implementation": "eager"},
    ],
)
def test_a_file_does_not_choose_the_implementation(changes, saved, tmp_path):
    _checkpoint(saved, tmp_path, **changes)
    with pytest.raises(mtsa.StateError, match="implementation"):
        mtsa.from_pretrained(LlamaForCausalLM, tmp_path)


def test_a_file_does_not_choose_the_implementation_under_another_name(saved, tmp_path):
    renamed = {"attribute_map": {"tag": "_attn_implementation"}, "tag": "someone/kernel"}
    _checkpoint(saved, tmp_path, **renamed)
    with pytest.raises(mtsa.StateError, match="got attribute_map"):
        mtsa.from_pretrained(LlamaForCausalLM, tmp_path)


def test_a_file_does_not_choose_the_implementation_in_another_file(saved, tmp_path):
    _checkpoint(saved, tmp_path, _attn_implementation="someone/kernel")
    (tmp_path / "config.json").rename(tmp_path / "config.4.0.0.json")
    _checkpoint(saved, tmp_path, configuration_files=["config.4.0.0.json"])
    with pytest.raises(mtsa.StateError, match="got configuration_files"):
        mtsa.from_pretrained(LlamaForCausalLM, tmp_path)


def test_a_checkpoint_runs_no_code(saved, tmp_path):
    _checkpoint(saved, tmp_path, model_type="unknown", auto_map={"AutoConfig": "code.Config"})
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(mtsa.StateError, match="can't load it"):
        mtsa.from_pretrained(AutoModelForCausalLM, tmp_path)


def test_a_checkpoint_is_no_pickle(saved, tmp_path):
    _checkpoint(saved, tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / "pytorch_model.bin")
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="safetensors"):
        mtsa.from_pretrained(LlamaForCausalLM, tmp_path)


def test_weights_that_are_missing_or_of_another_shape_are_refused(saved, tmp_path):
    _checkpoint(saved, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(mtsa.StateError, match=r"no weights for .*model\.norm\.weight"):
        mtsa.from_pretrained(LlamaForCausalLM, tmp_path)
    _, info = mtsa.from_pretrained(LlamaForCausalLM, tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"model.norm.weight"}
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(mtsa.StateError, match="can't load it"):
        mtsa.from_pretrained(LlamaForCausalLM, tmp_path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_weights_of_another_kind_are_refused(dtype, saved, model, tmp_path):
    (tmp_path / STATE).write_bytes(saved[STATE])
    (tmp_path / WEIGHTS).write_bytes(saved[WEIGHTS])
    state = json.loads(saved[STATE])
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, tmp_path / WEIGHTS, {"state_sha256": state["state_sha256"]})
    before = snapshot(model)
    with pytest.raises(mtsa.StateError, match=r"another shape or kind.*model\.norm\.weight"):
        mtsa.restore(model, tmp_path)
    assert snapshot(model) == before


def test_packed_weights_are_refused(saved, model, tmp_path):
    # Two numbers a byte: torch sees another shape than the file says.
    length = int.from_bytes(saved[WEIGHTS][:8], "little")
    header, numbers = json.loads(saved[WEIGHTS][8 : 8 + length]), 0
    for name, tensor in header.items():
        if name != "__metadata__":
            packed = name == "model.norm.weight"
            tensor["dtype"] = "F4" if packed else tensor["dtype"]
            begin, end = tensor["data_offsets"]
            size = (end - begin) // 8 if packed else end - begin
            tensor["data_offsets"] = [numbers, numbers + size]
            numbers += size
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(numbers)
    (tmp_path / STATE).write_bytes(saved[STATE])
    (tmp_path / WEIGHTS).write_bytes(content)
    before = snapshot(model)
    with pytest.raises(mtsa.StateError, match=r"kind.*model\.norm\.weight"):
        mtsa.restore(model, tmp_path)
    assert snapshot(model) == before


def test_a_block_with_a_pattern_twice_is_refused(saved, tmp_path):
    config = json.loads(saved["config.json"])
    rules = config["sparse_attention_config"]["config"]["sparse_cfg"]
    rules.append(rules[1])
    _checkpoint(saved, tmp_path, **config)
    with pytest.raises(mtsa.StateError, match="twice"):
        mtsa.from_pretrained(LlamaForCausalLM, tmp_path)

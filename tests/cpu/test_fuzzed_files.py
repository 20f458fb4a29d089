"""Files with random changes and damages: each loads, or a typed error says why not."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

import modelopt_sparse as mtsa
from modelopt_sparse.config import SparseAttentionConfig
from tests.cpu import tiny
from tests.cpu.hostile import RULES, SKIP, STATE, WEIGHTS, saved_files, sparse_model
from tests.cpu.tiny import snapshot

CONFIG = {"sparse_cfg": RULES, "include_non_causal": False, "calibration": {"samples": 2}}
EXPORTED = {
    "sparse_attention_config": {
        "config_groups": {
            "group_0": {
                "algorithm": "skip_softmax",
                "targets": ["*"],
                "ignore": ["lm_head"],
                "target_sparsity": {"prefill": 0.5},
                "threshold_scale_factor": {
                    "formula": "a * exp(b * target_sparsity)",
                    "prefill": {"a": 7.0, "b": 3.0},
                },
            }
        }
    }
}
fuzzed = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from(
        [0, 1, 2, -1, 2**31, 10**400, "", "*", "x" * 10**5, [], {}, [[]], "{a,b}" * 800]
    ),
    st.floats(),
    st.text(max_size=5),
    st.recursive(
        st.sampled_from([None, 0.5, "default", SKIP]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["method", "enable", "*", "a"]), inner, max_size=3)
        ),
        max_leaves=6,
    ),
)


def _changed(data, draw):
    """`data` with one value somewhere replaced, removed, repeated or added."""
    data = copy.deepcopy(data)
    while True:
        at = draw(st.sampled_from(sorted(data) if isinstance(data, dict) else range(len(data))))
        if isinstance(data[at], dict | list) and data[at] and draw(st.booleans()):
            inner = _changed(data[at], draw)
            data[at] = inner
            return data
        how = draw(st.sampled_from(["replace", "remove", "add"]))
        if how == "remove":
            del data[at]
        elif how == "replace":
            data[at] = draw(VALUES)
        elif isinstance(data, dict):
            data[draw(st.text(max_size=9))] = draw(VALUES)
        else:
            data.insert(at, draw(st.one_of(VALUES, st.just(data[at]))))
        return data


def _damaged(content, draw):
    """`content` cut, or with bytes flipped, put in or repeated."""
    how = draw(st.sampled_from(["cut", "flip", "insert", "repeat"]))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if how == "cut":
        return content[:at]
    if how == "flip":
        return (
            content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
        )
    if how == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=9)) + content[at:]
    return content[:at] + content[at // 2 :]


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


def _loads_or_is_refused(model, load):
    before = snapshot(model)
    try:
        load()
    except mtsa.StateError as error:
        assert len(str(error)) < 5000
        assert snapshot(model) == before
    else:
        # What loads also runs, or says why not.
        with contextlib.suppress(mtsa.SparseAttentionError):
            tiny.logits(model, tiny.prompt(40))
        mtsa.unsparsify(model)


@fuzzed
@given(data=st.data())
def test_any_change_of_a_state_is_harmless(data, sparse, model):
    state = _changed(mtsa.modelopt_state(sparse), data.draw)
    _loads_or_is_refused(model, lambda: mtsa.restore_from_modelopt_state(model, state))


@fuzzed
@given(data=st.data())
def test_any_damage_of_saved_files_is_harmless(data, saved, tmp_path):
    model = tiny.tiny_llama()
    (tmp_path / STATE).write_bytes(saved[STATE])
    (tmp_path / WEIGHTS).write_bytes(saved[WEIGHTS])
    name = data.draw(st.sampled_from([STATE, WEIGHTS]))
    content = saved[name]
    if name == WEIGHTS:
        # Most of the file are numbers, any of which is as good as another.
        head, tail = content[:3000], content[3000:]
        content = _damaged(head, data.draw) + data.draw(st.sampled_from([tail, b""]))
    else:
        content = _damaged(content, data.draw)
    (tmp_path / name).write_bytes(content)
    _loads_or_is_refused(model, lambda: mtsa.restore(model, tmp_path))


@fuzzed
@given(data=st.data())
def test_any_change_of_a_block_is_harmless(data, saved, tmp_path):
    config = json.loads(saved["config.json"])
    block = _changed(config["sparse_attention_config"], data.draw)
    config["sparse_attention_config"] = block
    (tmp_path / WEIGHTS).write_bytes(saved["hf"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        mtsa.from_pretrained(LlamaForCausalLM, tmp_path)
    except mtsa.StateError as error:
        assert len(str(error)) < 5000


@fuzzed
@given(data=st.data())
def test_any_damage_of_a_checkpoint_is_harmless(data, saved, tmp_path):
    config = json.loads(saved["config.json"])
    (tmp_path / WEIGHTS).write_bytes(saved["hf"])
    # Not changed: what makes transformers build a model of another size, which may be huge.
    block = json.dumps({"sparse_attention_config": config.pop("sparse_attention_config")})
    damaged = _damaged(block.encode()[1:], data.draw)
    (tmp_path / "config.json").write_bytes(json.dumps(config).encode()[:-1] + b"," + damaged)
    try:
        mtsa.from_pretrained(LlamaForCausalLM, tmp_path)
    except mtsa.StateError as error:
        assert len(str(error)) < 5000


def _load_config(path, content):
    path.write_bytes(content)
    try:
        SparseAttentionConfig.load(path)
    except mtsa.ConfigError as error:
        assert len(str(error)) < 5000


@fuzzed
@given(data=st.data(), suffix=st.sampled_from(["json", "yaml"]))
def test_any_change_of_a_configuration_file_is_harmless(data, suffix, tmp_path):
    content = json.dumps(_changed(CONFIG, data.draw)).encode()
    _load_config(tmp_path / f"c.{suffix}", content)


@settings(fuzzed, max_examples=150)
@given(data=st.data(), suffix=st.sampled_from(["json", "yaml"]))
def test_any_damage_of_a_configuration_file_is_harmless(data, suffix, tmp_path_factory, tmp_path):
    path = tmp_path / f"c.{suffix}"
    SparseAttentionConfig.load(CONFIG).save(path)
    _load_config(path, _damaged(path.read_bytes(), data.draw))


@fuzzed
@given(data=st.data())
def test_any_change_of_an_exported_block_is_harmless(data, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(_changed(EXPORTED, data.draw)))
    try:
        SparseAttentionConfig.from_checkpoint(tmp_path)
    except mtsa.ConfigError as error:
        assert len(str(error)) < 5000

"""Everything that changes the output survives every way of keeping a model, to the bit."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from transformers import LlamaForCausalLM

import modelopt_sparse as mtsa
from modelopt_sparse.methods import registry
from modelopt_sparse.module_state import sparse_modules
from tests.cpu import tiny
from tests.cpu.tiny import config_of, generate, logits

TRITON, FLASH, NM = "triton_skip_softmax", "flash_skip_softmax", "triton_sparse_softmax"
TRITON_NM = "triton_skip_sparse_softmax"
LENGTHS, TARGETS = [64, 512], [0.2, 0.8]


def _table(*cells):
    """A calibrated threshold of 30%, with these factors at both lengths."""
    table = {"lengths": LENGTHS, "targets": TARGETS, "factors": [cells, cells]}
    return {"target_sparsity": 0.3, "table": table}


FORMULA = {"target_sparsity": 0.3, "formula": {"a": 3.7, "b": 5.1, "worst_error": 1.5}}
LOW = {"target_sparsity": 0.3, "formula": {"a": 3.7e-12, "b": 5.1}}
BOTH = {**_table(7.3e-12, 111.7e-12), "formula": FORMULA["formula"]}
BY_HEAD = _table([0.01, 9.1], [0.02, 50.3])

# By method and field, a value other than its default that this model's output shows, and what else has to be.
PHASES = {"skip_softmax_threshold": 0.1, "skip_softmax_decode_threshold": 0.1}
SMALL = {"thresholds": {"prefill": [0.1], "decode": [0.1]}, "br": 16, "bc": 16}
FIELDS = {
    (TRITON, "skip_softmax_threshold"): [(1e-12 / 3, {}), (LOW, {}), (BOTH, {}), (None, {})],
    (TRITON, "skip_softmax_decode_threshold"): [(0.1, {}), (FORMULA, {}), (_table(7.3, 90.1), {})],
    (TRITON, "decode_block_keys"): [(16, PHASES)],
    (TRITON, "decode_segment_keys"): [(128, PHASES | {"decode_block_keys": 16})],
    (TRITON, "decode_vote_heads"): [(1, PHASES | {"decode_block_keys": 16})],
    (TRITON, "min_context"): [(301, PHASES), (2**31 - 1, PHASES), ("auto", PHASES)],
    (TRITON, "backend"): [("pytorch", PHASES)],
    (FLASH, "thresholds"): [
        ({"prefill": [0.1, 0.5], "decode": None}, {"br": 16}),
        ({"prefill": [BY_HEAD, 0.5]}, {"br": 16, "bc": 16}),
        ({"decode": [FORMULA]}, {}),
    ],
    (FLASH, "br"): [(16, {"thresholds": SMALL["thresholds"]})],
    (FLASH, "bc"): [(16, {"thresholds": SMALL["thresholds"]})],
    (FLASH, "decode_block_keys"): [(16, SMALL)],
    (FLASH, "decode_segment_keys"): [(128, SMALL | {"decode_block_keys": 16})],
    (FLASH, "decode_vote_heads"): [(1, SMALL | {"decode_block_keys": 16})],
    (FLASH, "min_context"): [(303, SMALL)],
    (FLASH, "backend"): [("triton", SMALL)],
    (NM, "sparsity_n"): [(1, {"dense_window_size": 16}), (3, {"dense_window_size": 16})],
    (NM, "sparsity_m"): [(8, {"dense_window_size": 16})],
    (NM, "num_sink_tokens"): [(64, {"dense_window_size": 16})],
    (NM, "dense_window_size"): [(16, {})],
    (NM, "backend"): [("pytorch", {"dense_window_size": 16})],
}
# One method has the fields of two.
FIELDS |= {
    (TRITON_NM, field): values for (name, field), values in FIELDS.items() if name in (TRITON, NM)
}
# These only say where it is computed, or by which kernels.
UNSEEN = {"backend"}
CASES = [
    (method, field, value, others)
    for (method, field), values in FIELDS.items()
    for value, others in values
]


def test_every_field_of_every_method_is_tested():
    ours = {
        name: method.Config.model_fields
        for name, method in registry.sparse_methods().items()
        if method.__module__.startswith("modelopt_sparse.")
    }
    fields = {(name, field) for name, of_method in ours.items() for field in of_method}
    assert set(FIELDS) == fields - {(name, "method") for name in ours}


def _outputs(model):
    with torch.no_grad():
        return logits(model), generate(model, tokens=3)


def _configs(model):
    return {name: module.method.config for name, module in sparse_modules(model)}


def _same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _fresh():
    """A dense model of the same weights, whose two heads attend to different keys."""
    model = tiny.tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight[16:] = layer.self_attn.q_proj.weight[16:].flip(0)
    return model


def _blank():
    """A dense model of other weights, for where weights are kept too."""
    model = tiny.tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def _saved(model, folder):
    mtsa.save(model, folder)
    return mtsa.restore(_blank(), folder)


def _pretrained(model, folder):
    model.save_pretrained(folder)
    loaded = mtsa.from_pretrained(LlamaForCausalLM, folder)
    loaded.generation_config.eos_token_id = None
    return loaded


def _state(model, folder):
    text = json.dumps(mtsa.modelopt_state(model), allow_nan=False)
    return mtsa.restore_from_modelopt_state(_fresh(), json.loads(text))


WAYS = {
    "save": _saved,
    "save_pretrained": _pretrained,
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "state": _state,
}


def _kept_in_every_way(model, folder):
    expected = _outputs(model)
    states = mtsa.modelopt_state(model)
    for name, way in WAYS.items():
        kept = way(model, folder / name)
        assert mtsa.modelopt_state(kept) == states, name
        assert _configs(kept) == _configs(model), name
        assert _same(_outputs(kept), expected), name
    return expected


@pytest.mark.parametrize(
    ("method", "field", "value", "others"), CASES, ids=[f"{m}-{f}-{v}"[:60] for m, f, v, _ in CASES]
)
def test_every_field_survives_in_every_way(method, field, value, others, tmp_path):
    model = mtsa.sparsify(_fresh(), config_of(method, **others | {field: value}))
    expected = _kept_in_every_way(model, tmp_path)
    if field not in UNSEEN:
        # Or it might have been lost in all ways and not be missed.
        default = mtsa.sparsify(_fresh(), config_of(method, **others))
        assert not _same(_outputs(default), expected)


@pytest.mark.parametrize("pattern", ["*", "*layers.0.*", "*layers.1.*"])
def test_what_is_disabled_survives_in_every_way(pattern, tmp_path):
    model = mtsa.sparsify(_fresh(), config_of(FLASH, **SMALL))
    enabled = _outputs(model)
    expected = _kept_in_every_way(mtsa.disable_sparse_attention(model, pattern), tmp_path)
    assert not _same(expected, enabled)


def test_modules_of_different_methods_survive_in_every_way(tmp_path):
    first = {"method": NM, "dense_window_size": 16}
    second = {"method": FLASH, **SMALL, "thresholds": {"prefill": [BY_HEAD, 0.2]}}
    rules = {"*layers.0.*": first, lambda name, module: "1" in name: second}
    model = mtsa.sparsify(_fresh(), {"sparse_cfg": {**rules}})
    with pytest.raises(mtsa.ConfigError, match="callable"):
        mtsa.modelopt_state(model)
    named = {"*layers.0.*": first, "*layers.1.*": second}
    model = mtsa.sparsify(model, {"sparse_cfg": named, "calibration": None})
    _kept_in_every_way(model, tmp_path)

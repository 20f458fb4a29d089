"""The ready-made configurations."""

import copy

import pytest
from pydantic import ValidationError

from modelopt_sparse import presets
from modelopt_sparse.config import SparseAttentionConfig
from modelopt_sparse.methods import (
    FlashSkipSoftmaxConfig,
    TritonSkipSoftmaxConfig,
    TritonSkipSparseSoftmaxConfig,
    TritonSparseSoftmaxConfig,
)
from modelopt_sparse.patterns import Target

EXPECTED = {
    "skip_softmax": (presets.SKIP_SOFTMAX_TRITON_DEFAULT, TritonSkipSoftmaxConfig()),
    "sparse_softmax": (presets.SPARSE_SOFTMAX_DEFAULT, TritonSparseSoftmaxConfig()),
    "skip_sparse_softmax": (presets.SKIP_SPARSE_SOFTMAX_DEFAULT, TritonSkipSparseSoftmaxConfig()),
    "flash_skip_softmax": (presets.SKIP_SOFTMAX_DEFAULT, FlashSkipSoftmaxConfig()),
    "skip_softmax_calib": (presets.SKIP_SOFTMAX_TRITON_CALIB, TritonSkipSoftmaxConfig()),
    "flash_skip_softmax_calib": (presets.SKIP_SOFTMAX_CALIB, FlashSkipSoftmaxConfig()),
}
SELF = Target("model.layers.0.self_attn", "LlamaAttention", None)
CROSS = Target("decoder.0.cross_attn", "Attention", None, causal_self_attention=False)


def test_every_preset_has_its_command_line_name():
    assert dict(presets.PRESETS) == {name: config for name, (config, _) in EXPECTED.items()}
    public = [value for value in vars(presets).values() if isinstance(value, SparseAttentionConfig)]
    assert sorted(map(id, public)) == sorted(map(id, presets.PRESETS.values()))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_makes_causal_self_attention_sparse_with_documented_numbers(name):
    config, expected = EXPECTED[name]
    resolved = config.resolve(SELF)
    assert resolved.config == expected
    assert resolved.enabled is True
    assert config.resolve(CROSS) is None


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_spells_out_its_backend(name):
    config, expected = EXPECTED[name]
    assert config.sparse_cfg["*"]["backend"] == expected.backend
    assert config.sparse_cfg["default"] == {"enable": False}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_cannot_change(name):
    config, _ = EXPECTED[name]
    before = copy.deepcopy(config)
    with pytest.raises(ValidationError, match="frozen"):
        config.sparse_cfg = {}
    with pytest.raises(ValidationError, match="frozen"):
        config.include_non_causal = True
    with pytest.raises(TypeError):
        config.sparse_cfg["*"] = {}
    config.sparse_cfg["*"]["backend"] = "cuda"
    config.to_dict()["sparse_cfg"]["*"]["enable"] = False
    config.with_rule("*", enable=False)
    with pytest.raises(ValidationError, match="frozen"):
        config.resolve(SELF).config.backend = "pytorch"
    assert config == before
    with pytest.raises(TypeError):
        presets.PRESETS["mine"] = config


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_round_trips(name, tmp_path):
    config, _ = EXPECTED[name]
    assert SparseAttentionConfig.load(config.to_dict()) == config
    for suffix in ("json", "yaml", "yml"):
        config.save(tmp_path / f"preset.{suffix}")
        assert SparseAttentionConfig.load(tmp_path / f"preset.{suffix}") == config


def test_deriving_from_a_preset_keeps_what_is_not_said():
    derived = presets.SKIP_SOFTMAX_TRITON_DEFAULT.with_rule("*", skip_softmax_threshold=0.2)
    derived = derived.with_rule("*.0.*", enable=False)
    resolved = derived.resolve(SELF)
    assert resolved.config == TritonSkipSoftmaxConfig(skip_softmax_threshold=0.2)
    assert resolved.enabled is False

"""A bound of what skipping costs, in place of a share: kept to, and no further from it than need be."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import modelopt_sparse as mtsa
from modelopt_sparse.calibration.fit import TARGETS
from modelopt_sparse.config.calibration import CalibrationConfig
from modelopt_sparse.errors import ConfigError
from tests.cpu.bundled import LAYERS, dense_model, generated, methods, output_error, shares, source
from tests.cpu.tiny import prompt, tiny_config

SMALL = {"samples": 2, "max_seqlen": 1024, "num_decode_tokens": 3}
BOUNDS = ["target_error", "target_dropped_mass", "target_max_dropped_mass"]


@pytest.fixture
def model() -> nn.Module:
    return mtsa.sparsify(dense_model(), mtsa.SKIP_SOFTMAX_TRITON_DEFAULT)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["model", "layer"])
def test_outputs_err_as_much_as_is_allowed(model, kind):
    data, error = [source(1024), source(1024, 40_000)], 0.05
    config = {"target_error": {"prefill": error}, "thresholds_for": kind}
    mtsa.calibrate(model, {**config, "num_decode_tokens": 1}, data)
    shares_found = {method.skip_softmax_threshold.target_sparsity for method in methods(model)}
    assert len(shares_found) == (1 if kind == "model" else LAYERS)
    assert all(0.02 < share < 0.9 for share in shares_found)
    # The share that holds at every length may leave some of the error at this one.
    assert 0.5 * error < output_error(model, data) ** 0.5 < 1.1 * error
    assert methods(model)[0].skip_softmax_decode_threshold is None


def dropped_masses(model: nn.Module, prompt: torch.Tensor) -> list:
    found = mtsa.compare(model, [prompt])
    return [module.prefill.dropped_mass for module in found.modules.values()]


@pytest.mark.parametrize("kind", ["model", "layer"])
def test_rows_lose_no_more_on_average_than_is_allowed(model, kind):
    bound, prompt = 0.01, source(1024)
    config = {"target_dropped_mass": {"prefill": bound}, "thresholds_for": kind}
    mtsa.calibrate(model, {**config, "num_decode_tokens": 1}, [prompt])
    shares_found = {method.skip_softmax_threshold.target_sparsity for method in methods(model)}
    assert len(shares_found) == (1 if kind == "model" else LAYERS)
    found = []
    for length in (512, 1024):
        means = [mass.mean.overall for mass in dropped_masses(model, prompt[:, :length])]
        found.append(sum(means) / LAYERS if kind == "model" else max(means))
    # It is kept to by octaves of lambda, at the length at which more is lost.
    assert 0.3 * bound < max(found) <= bound, found


@pytest.mark.parametrize("kind", ["model", "layer"])
def test_no_row_loses_more_than_is_allowed(model, kind):
    bound, prompt = 0.1, source(1024)
    config = {"target_max_dropped_mass": {"prefill": bound}, "thresholds_for": kind}
    mtsa.calibrate(model, {**config, "num_decode_tokens": 1}, [prompt])
    found = [
        mass.max.overall
        for length in (512, 1024)
        for mass in dropped_masses(model, prompt[:, :length])
        if mass is not None  # a layer that skips nothing has none
    ]
    assert 0.3 * bound < max(found) <= bound, found


@pytest.mark.parametrize("name", BOUNDS)
def test_a_bound_that_nothing_reaches_and_one_that_everything_is_within(model, name):
    """Then lambda is 1 at the length where that skips most."""
    for bound in (1e-12, 0.9999):
        mtsa.calibrate(model, {name: bound}, lambda m: generated(m, source(700)))
        mtsa.reset_stats(model)
        generated(model, source(700))
        for phase in ("prefill", "decode"):
            share = methods(model)[0].threshold(phase).target_sparsity
            assert share == (0.0 if bound < 0.1 else pytest.approx(shares(model, phase), abs=0.02))


def test_a_share_that_a_bound_gives_is_in_the_table_and_so_exact(model):
    mtsa.calibrate(
        model, {"target_dropped_mass": {"prefill": 0.0005}, "num_decode_tokens": 1}, [source(1024)]
    )
    threshold = methods(model)[0].skip_softmax_threshold
    assert 0 < threshold.target_sparsity < TARGETS[0] == threshold.table.targets[1]
    mtsa.reset_stats(model)
    with torch.no_grad():
        model(source(1024))
    assert shares(model, "prefill") == pytest.approx(threshold.target_sparsity, abs=0.01)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_bound_comes_back_with_what_was_saved(name, tmp_path):
    config = {
        "sparse_cfg": {"*": {"method": "triton_skip_softmax"}},
        "calibration": {name: {"prefill": 0.1}, **SMALL},
    }
    loaded = mtsa.SparseAttentionConfig.load(config)
    assert mtsa.SparseAttentionConfig.load(loaded.to_dict()) == loaded
    assert loaded.calibration.shares == {}
    model = mtsa.sparsify(dense_model(), config, [source(600)])
    mtsa.save(model, tmp_path / "state")
    model.save_pretrained(tmp_path / "checkpoint")
    for other in (
        mtsa.restore(dense_model(), tmp_path / "state"),
        mtsa.from_pretrained(AutoModelForCausalLM, tmp_path / "checkpoint"),
    ):
        assert methods(other) == methods(model)


def test_one_thing_is_aimed_at():
    assert CalibrationConfig().shares == {"prefill": 0.5, "decode": 0.5}
    for name in BOUNDS:
        for other in {"target_sparse_ratio", *BOUNDS} - {name}:
            with pytest.raises(ConfigError, match="takes one of target_sparse_ratio, target_error"):
                CalibrationConfig.load({name: 0.1, other: 0.5})
    for name in BOUNDS[1:]:
        with pytest.raises(ConfigError, match=rf"calibration\.{name}\.prefill: got 1\.0"):
            CalibrationConfig.load({name: 1.0})
    with pytest.raises(ConfigError, match='"model" or "layer" with target_max_dropped_mass'):
        CalibrationConfig.load({"target_max_dropped_mass": 0.1, "thresholds_for": "head"})


@pytest.fixture
def hybrid() -> nn.Module:
    """Two layers, the second of which sees 256 tokens, and so decodes by other numbers of keys."""
    kinds = ["full_attention", "sliding_attention"]
    window = {"use_sliding_window": True, "sliding_window": 256, "layer_types": kinds}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**{**tiny_config().to_dict(), **window})).eval()
    return mtsa.sparsify(model, mtsa.SKIP_SOFTMAX_TRITON_DEFAULT)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_bound_holds_for_modules_of_other_lengths_too(hybrid, name):
    config = {name: {"decode": 1e-12}, "num_decode_tokens": 3}
    mtsa.calibrate(hybrid, config, [prompt(700)])
    assert [method.threshold("decode").target_sparsity for method in methods(hybrid)] == [0, 0]


def test_heads_of_modules_with_other_lengths_have_tables_of_their_own(hybrid):
    config = {"target_sparse_ratio": {"decode": 0.5}, "thresholds_for": "head"}
    mtsa.calibrate(hybrid, {**config, "num_decode_tokens": 3}, [prompt(700)])
    full, sliding = (method.threshold("decode").table.lengths for method in methods(hybrid))
    assert full == (702,) and sliding == (256,)

"""Target against achieved: on text that wasn't calibrated on, counted as the model's own statistics do."""

from __future__ import annotations

import copy
import json
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import nn

import modelopt_sparse as mtsa
from modelopt_sparse.calibration.check_results import CalibrationCheck
from modelopt_sparse.calibration.prompts import held_out_prompts, prompts
from modelopt_sparse.config.calibration import CalibrationConfig
from modelopt_sparse.errors import ArgumentError, ArgumentTypeError, ConfigError
from modelopt_sparse.module_state import sparse_modules
from tests.cpu.bundled import MODEL, dense_model, shares, source
from tests.cpu.tiny import SKIP, tiny_llama

# Steps of one prompt are alike: enough of them, of both lengths, or their chance is most of what is off.
CONFIG = {"target_sparse_ratio": {"prefill": 0.2, "decode": 0.3}, "num_decode_tokens": 16}
STARTS = 20_000, 60_000, 100_000


@pytest.fixture(scope="module")
def calibrated() -> nn.Module:
    model = mtsa.sparsify(dense_model(), mtsa.SKIP_SOFTMAX_TRITON_DEFAULT)
    data = [source(length, start) for length in (1024, 512) for start in (0, 40_000, 80_000)]
    return mtsa.calibrate(model, CONFIG, data)


def places(found: mtsa.CalibrationCheck) -> list[tuple[str, int, int]]:
    return [(row.phase, row.length, row.sequences) for row in found.rows]


def test_held_out_text_is_skipped_within_3_points(calibrated):
    data = (source(length, start) for length in (1024, 640) for start in STARTS)
    found = mtsa.check_calibration(calibrated, data, CONFIG)
    phases = ("prefill", "decode")
    assert places(found) == [(phase, length, 3) for phase in phases for length in (640, 1024)]
    for row in found.rows:
        assert row.target == pytest.approx(CONFIG["target_sparse_ratio"][row.phase])
        assert row.achieved == pytest.approx(row.target, abs=0.03), row


@torch.no_grad()
def test_what_is_counted_is_what_the_statistics_say_and_these_stay(calibrated):
    model = copy.deepcopy(calibrated)
    mtsa.set_sparsity(model, 0.4)  # more than these prompts let be skipped: the row says so
    mtsa.reset_stats(model)
    model(source(700))
    before = mtsa.get_stats(model)
    (row,) = mtsa.check_calibration(mtsa.set_sparsity(model, {"decode": 0}), [source(700)]).rows
    assert (row.phase, row.length) == ("prefill", 700)
    assert row.achieved == pytest.approx(shares(model, "prefill"), abs=1e-12)
    assert mtsa.get_stats(model) == before


def test_each_sequence_of_a_batch_is_counted_alone_without_its_padding(calibrated):
    long, short = source(1024), source(600, 5000)
    ids = torch.full((2, 1024), 258)
    ids[0], ids[1, -600:] = long[0], short[0]
    batch = {"input_ids": ids, "attention_mask": (ids != 258).long()}
    config = {"num_decode_tokens": 1}
    together = mtsa.check_calibration(calibrated, [batch], config)
    assert together == mtsa.check_calibration(calibrated, [long, short], config)
    assert places(together)[:2] == [("prefill", 600, 1), ("prefill", 1024, 1)]


@torch.no_grad()
def test_modules_with_targets_of_their_own_have_the_mean_and_others_have_no_part(calibrated):
    model = copy.deepcopy(calibrated)
    mtsa.set_sparsity(model, {"prefill": 0.1}, "model.layers.0.self_attn")
    mtsa.disable_sparse_attention(model, "model.layers.2.self_attn")
    row = mtsa.check_calibration(model, [source(700)], {"num_decode_tokens": 1}).rows[0]
    assert row.target == pytest.approx(0.15)  # of the same tiles each
    mtsa.reset_stats(model)
    model(source(700))
    assert row.achieved == pytest.approx(shares(model, "prefill"), abs=1e-12)


def test_sequences_shorter_than_those_calibrated_are_dense_and_have_no_row(calibrated):
    found = mtsa.check_calibration(calibrated, [source(300), source(600)])
    assert places(found) == [("prefill", 600, 1), ("decode", 600, 1)]


def test_made_up_prompts_are_others_than_those_calibrated_on(calibrated, tmp_path):
    config = {"samples": 2, "max_seqlen": 2048, "num_decode_tokens": 1}
    found = mtsa.check_calibration(calibrated, None, config)
    lengths = (1536, 1792)
    assert places(found) == [(phase, n, 1) for phase in ("prefill", "decode") for n in lengths]
    single = CalibrationConfig(samples=2, max_seqlen=1024, tokenizer=str(MODEL))
    assert [x.shape[1] for x in held_out_prompts(nn.Linear(1, 1), single)] == [1024, 1024]
    (tmp_path / "text.txt").write_text("".join(f"line {n} " for n in range(40_000)))
    for files in (None, (str(tmp_path / "text.txt"),)):
        made = CalibrationConfig(samples=6, max_seqlen=1024, tokenizer=str(MODEL), text_files=files)
        seen, held_out = ([*prompts(nn.Linear(1, 1), made, seed)] for seed in (0, 1))
        assert not any(torch.equal(a, b) for a in seen for b in held_out)
        # Of files, no two have a common beginning of any length.
        assert files is None or len({tuple(ids[0, :50].tolist()) for ids in seen + held_out}) == 12


def test_what_a_bound_is_of_is_measured_as_compare_does(calibrated):
    """Of the modules that are calibrated in the phase, with the formula that the bound is meant by."""
    prompts_ = [source(700, start) for start in STARTS]
    modules = [module.prefill for module in mtsa.compare(calibrated, prompts_).modules.values()]
    mean = [module.dropped_mass.mean.overall for module in modules]
    most = [module.dropped_mass.max.overall for module in modules]
    error = [module.relative_error.overall for module in modules]
    of_all = {
        "target_dropped_mass": sum(mean) / 3,
        "target_max_dropped_mass": max(most),
        "target_error": (sum(x * x for x in error) / 3) ** 0.5,
    }
    by_layer = {
        "target_dropped_mass": max(mean),
        "target_max_dropped_mass": max(most),
        "target_error": max(error),
    }
    for kind, wanted in (("model", of_all), ("layer", by_layer)):
        for name, cost in wanted.items():
            config = {name: {"prefill": 0.25}, "num_decode_tokens": 1, "thresholds_for": kind}
            found = mtsa.check_calibration(calibrated, prompts_, config)
            prefill, decode = found.rows
            assert prefill.bound == 0.25 and prefill.cost == pytest.approx(cost, rel=1e-6)
            assert prefill.cost > 0 and decode.bound is decode.cost is None
            assert prefill.achieved == pytest.approx(prefill.target, abs=0.03)
    text = StringIO()
    found.print(Console(file=text, width=150))
    assert "output error: at most" in text.getvalue() and "0.25" in text.getvalue()


def test_the_data_is_json_and_the_table_has_a_line_a_row(calibrated):
    found = mtsa.check_calibration(calibrated, [source(600)])
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert found.to_dict()["rows"][1]["phase"] == "decode"
    near = CalibrationCheck(
        rows=tuple(r.model_copy(update={"achieved": r.target}) for r in found.rows)
    )
    far = CalibrationCheck(rows=(found.rows[0].model_copy(update={"achieved": 0.9}),))
    said = [StringIO() for _ in range(2)]
    for check, text in zip((near, far), said, strict=True):
        check.print(Console(file=text, width=120))
    assert "20.0%" in said[0].getvalue() and said[0].getvalue().count("600") == 2
    assert ["3 points off" in text.getvalue() for text in said] == [False, True]
    with pytest.raises(ArgumentTypeError, match="console"):
        found.print(3)


def test_what_is_not_taken_says_so(calibrated):
    for batches in (source(10), {"input_ids": source(10)}, "text", lambda model: None, 3):
        with pytest.raises(ArgumentTypeError, match="batches: got"):
            mtsa.check_calibration(calibrated, batches)
    with pytest.raises(ArgumentTypeError, match="a batch to calibrate with"):
        mtsa.check_calibration(calibrated, ["text"])
    for batches in ([], [source(300)]):
        with pytest.raises(ArgumentError, match="batches: got none"):
            mtsa.check_calibration(calibrated, batches)
    with pytest.raises(ConfigError, match=r"calibration\.sample: "):
        mtsa.check_calibration(calibrated, None, {"sample": 2})
    with pytest.raises(ArgumentTypeError, match="model"):
        mtsa.check_calibration(3)
    disabled = mtsa.disable_sparse_attention(copy.deepcopy(calibrated))
    for model in (tiny_llama(), mtsa.sparsify(tiny_llama(), SKIP), disabled):
        with pytest.raises(ConfigError, match="an enabled module that is calibrated to skip"):
            mtsa.check_calibration(model, [source(10)])


def test_a_model_that_runs_another_attention_says_so(calibrated):
    model = copy.deepcopy(calibrated)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ArgumentError, match="whose attention is modelopt_triton"):
        mtsa.check_calibration(model, [source(600)])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_statistics_stay_when_it_is_interrupted(calibrated, error):
    def broken():
        yield source(600)
        raise error

    before = [module.stats for _, module in sparse_modules(calibrated)]
    with pytest.raises(error):
        mtsa.check_calibration(calibrated, broken())
    assert all(
        a is module.stats for a, (_, module) in zip(before, sparse_modules(calibrated), strict=True)
    )

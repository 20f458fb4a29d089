"""Calibration: a share of tiles is asked for, on the bundled model, and that share is skipped."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import modelopt_sparse as mtsa
from modelopt_sparse.calibration.curve import Curve
from modelopt_sparse.calibration.fit import TARGETS, formula_of
from modelopt_sparse.calibration.prompts import prompts
from modelopt_sparse.calibration.recorder import Recorder, Tally, by_length
from modelopt_sparse.config.calibration import CalibrationConfig
from modelopt_sparse.errors import ArgumentTypeError, ConfigError, UnsupportedCall
from modelopt_sparse.kernels.types import Phase
from modelopt_sparse.methods.calibrated import CalibratedThreshold
from modelopt_sparse.module import observed
from modelopt_sparse.module_state import sparse_modules
from tests.cpu.bundled import (
    LAYERS,
    MODEL,
    dense_model,
    generated,
    methods,
    output_error,
    shares,
    source,
)
from tests.cpu.tiny import tiny_llama

SMALL = {"samples": 2, "max_seqlen": 1024, "num_decode_tokens": 3}


@pytest.fixture
def model() -> nn.Module:
    return mtsa.sparsify(dense_model(), mtsa.SKIP_SOFTMAX_TRITON_DEFAULT)


@pytest.fixture(scope="module")
def calibrated() -> nn.Module:
    model = mtsa.sparsify(dense_model(), mtsa.SKIP_SOFTMAX_TRITON_DEFAULT)
    data = [source(1024, start) for start in (0, 40_000, 80_000)]
    return mtsa.calibrate(model, {"num_decode_tokens": 2}, data)


@torch.no_grad()
@pytest.mark.parametrize("target", [0.1, 0.3])
def test_what_it_was_calibrated_on_is_skipped_as_asked(calibrated, target):
    """What is left is what layers see of those before them, which are sparse now, and were dense."""
    model = copy.deepcopy(calibrated)
    mtsa.set_sparsity(model, target)
    mtsa.reset_stats(model)
    for start in (0, 40_000, 80_000):
        model(source(1024, start))
    assert shares(model, "prefill") == pytest.approx(target, abs=0.015)


@torch.no_grad()
def test_other_text_of_other_lengths_is_skipped_within_3_points(calibrated):
    model = copy.deepcopy(calibrated)
    mtsa.set_sparsity(model, 0.2)
    for length in (750, 1000):
        mtsa.reset_stats(model)
        for start in (20_000, 60_000, 100_000):
            model(source(length, start))
        assert shares(model, "prefill") == pytest.approx(0.2, abs=0.03), length


@torch.no_grad()
def test_decode_skips_by_its_own_threshold(calibrated):
    model = copy.deepcopy(calibrated)
    mtsa.set_sparsity(model, {"prefill": 0, "decode": 0.3})
    prompt = source(1024)
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False
    )
    assert next(iter(mtsa.get_stats(model).values()))["prefill"] is None
    assert shares(model, "decode") == pytest.approx(0.3, abs=0.05)


def counted(model: nn.Module, *prompts: torch.Tensor) -> dict[int, Tally]:
    """What the first module counts of prompts, by length."""
    (_, module), *_ = sparse_modules(model)
    recorder = Recorder(module.method.plan())
    with observed({module: recorder}), torch.no_grad():
        for prompt in prompts:
            model(prompt)
    return by_length(recorder.tallies, Phase.PREFILL)


def test_a_prompt_is_counted_as_all_of_its_beginnings(model):
    """The counts of one prompt, cut by the length of a shorter one, are that one's, to the tile."""
    prompt = source(1100)
    whole = counted(model, prompt)
    assert list(whole) == [512, 1024, 1100]
    for length in (512, 1024):
        alone = counted(model, prompt[:, :length])
        assert list(alone)[-1] == length
        assert torch.equal(alone[length].histogram, whole[length].histogram)
    assert list(counted(model, prompt[:, :700])) == [512, 700]


def test_rows_weigh_alike_however_many_prompts_had_them(model):
    """Of a long and a short prompt, the length of the long one has its own rows once, and the mean of the
    first ones, which both have."""
    long, short = source(1024), source(512, 5000)
    both = counted(model, long, short)
    of_long, of_short = counted(model, long), counted(model, short)
    first = (of_long[512].histogram + of_short[512].histogram) / 2
    assert torch.equal(both[512].histogram, first)
    rest = of_long[1024].histogram - of_long[512].histogram
    torch.testing.assert_close(both[1024].histogram, first + rest)


@torch.no_grad()
def test_chunks_padding_and_batches_are_counted_as_prompts_alone(model):
    def run(config: dict, data: list) -> list:
        fresh = copy.deepcopy(model)
        mtsa.calibrate(fresh, {"target_sparse_ratio": {"prefill": 0.4}, **config}, data)
        return [method.skip_softmax_threshold.table for method in methods(fresh)]

    long, short = source(1024), source(600, 5000)
    alone = run({"num_decode_tokens": 1}, [long, short])
    assert run({"num_decode_tokens": 1, "chunk_size": 256}, [long, short]) == alone
    ids = torch.full((2, 1024), 258)
    ids[0], ids[1, -600:] = long[0], short[0]
    mask = (ids != 258).long()
    together = {
        "input_ids": ids,
        "attention_mask": mask,
    }

    def loop(fresh: nn.Module) -> None:
        fresh(**together, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))

    assert run({}, loop) == alone


@torch.no_grad()
def test_the_model_computes_densely_while_it_is_calibrated(model):
    prompt, found = source(1024), []
    mtsa.calibrate(model, SMALL, lambda m: found.append(generated(m, prompt)))
    wanted = generated(dense_model(), prompt)
    torch.testing.assert_close(found[0], wanted, rtol=1e-5, atol=1e-4)
    assert mtsa.get_stats(model)["model.layers.0.self_attn"]["prefill"] is None


def test_made_up_prompts_need_nothing_but_the_models_tokenizer(model):
    mtsa.calibrate(model, SMALL)
    threshold = methods(model)[0].skip_softmax_threshold
    assert isinstance(threshold, CalibratedThreshold) and threshold.table.lengths == (512, 1024)
    assert methods(model)[0].min_context == 512
    again = mtsa.sparsify(dense_model(), mtsa.SKIP_SOFTMAX_TRITON_DEFAULT)
    mtsa.calibrate(again, SMALL)
    assert methods(again) == methods(model)


def test_layers_get_thresholds_of_their_own(model):
    data = [source(1024)]
    mtsa.calibrate(
        model, {"thresholds_for": "layer", "target_sparse_ratio": {"prefill": 0.2}}, data
    )
    assert len({method.skip_softmax_threshold for method in methods(model)}) == LAYERS
    mtsa.reset_stats(model)
    with torch.no_grad():
        model(data[0])
    found = [entry["prefill"]["sparsity"] for entry in mtsa.get_stats(model).values()]
    assert found == pytest.approx([0.2] * LAYERS, abs=0.03)


@torch.no_grad()
def test_heads_skip_where_it_costs_least(model):
    """As many tiles in all as with one threshold for all, and less error, on prompts that weren't counted."""
    data, held_out = [source(1024), source(1024, 40_000)], [source(1024, 80_000)]
    errors, found = {}, {}
    for kind in ("model", "head"):
        own = copy.deepcopy(model)
        config = {"thresholds_for": kind, "target_sparse_ratio": {"prefill": 0.3}}
        mtsa.calibrate(own, {**config, "num_decode_tokens": 1}, data)
        errors[kind] = output_error(own, held_out)
        mtsa.reset_stats(own)
        own(held_out[0])
        found[kind] = shares(own, "prefill")
        if kind == "head":
            heads = methods(own)[0].skip_softmax_threshold.table.factors[-1][5]
            assert len(heads) == own.config.num_attention_heads and len(set(heads)) > 1
            assert methods(own)[0].skip_softmax_threshold.formula is None
    assert found["head"] == pytest.approx(found["model"], abs=0.03)
    assert errors["head"] < 0.8 * errors["model"], (errors, found)


@torch.no_grad()
def test_heads_that_decide_together_share_a_threshold(model):
    mtsa.calibrate(
        model, {"thresholds_for": "head", "target_sparse_ratio": {"decode": 0.2}}, [source(700)]
    )
    config = model.config
    table = methods(model)[0].skip_softmax_decode_threshold.table
    together = config.num_attention_heads // config.num_key_value_heads
    for cell in (cell for row in table.factors for cell in row):
        assert len(cell) == config.num_attention_heads
        assert all(len(set(cell[i : i + together])) == 1 for i in range(0, len(cell), together))
    ids = source(700)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert 0 < shares(model, "decode") < 0.5


def test_a_formula_runs_where_that_is_asked_for(model):
    mtsa.calibrate(model, {**SMALL, "form": "formula", "target_sparse_ratio": {"prefill": 0.3}})
    threshold = methods(model)[0].skip_softmax_threshold
    assert threshold.table is None
    factor = threshold.formula.a * 2.718281828459045 ** (threshold.formula.b * 0.3)
    assert threshold.scale_factor.factors == (pytest.approx(factor),)
    assert methods(model)[0].skip_softmax_decode_threshold is None


def test_the_fit_finds_the_coefficients_of_curves_that_follow_the_formula():
    a, b = 2.0, 6.0

    class Ideal(Curve):
        def __init__(self, length: int):
            object.__setattr__(self, "length", length)

        most = 0.9

        def threshold(self, share: float) -> float:
            return min(a * 2.718281828459045 ** (b * share) / self.length, 1.0)

        def share(self, threshold: float) -> float:
            return torch.tensor(threshold * self.length / a).log().item() / b

    found = formula_of({length: Ideal(length) for length in (2048, 8192)})
    assert (found.a, found.b) == pytest.approx((a, b), rel=1e-4)
    assert found.worst_error < 0.1
    assert 0.9 in TARGETS


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, Interrupted, KeyboardInterrupt])
def test_an_interrupted_calibration_leaves_the_model_as_it_was(model, error):
    before = pickle.dumps(methods(model))

    def loop(m: nn.Module) -> None:
        m(source(600))
        raise error

    with pytest.raises(error):
        mtsa.calibrate(model, SMALL, loop)
    assert pickle.dumps(methods(model)) == before
    assert all(module.observer is None for _, module in sparse_modules(model))
    dense = dense_model()
    with pytest.raises(error):
        mtsa.sparsify(dense, mtsa.SKIP_SOFTMAX_TRITON_CALIB, loop)
    assert not mtsa.is_attn_sparsified(dense)


def test_sparsify_calibrates_where_the_configuration_says_so(model):
    config = {
        "sparse_cfg": {
            "*": {"method": "triton_skip_softmax"},
            "calibration": {"target_sparse_ratio": {"prefill": 0.3}, **SMALL},
        }
    }
    fresh = mtsa.sparsify(dense_model(), config, [source(1024)])
    mtsa.calibrate(model, {"target_sparse_ratio": {"prefill": 0.3}, **SMALL}, [source(1024)])
    assert methods(fresh) == methods(model)
    by_calibrate = mtsa.calibrate(dense_model(), config, [source(1024)])
    assert methods(by_calibrate) == methods(model)


def test_the_summary_says_shares_and_not_tables(calibrated):
    console = Console(record=True, width=200)
    mtsa.print_sparse_attention_summary(calibrated, console)
    said = console.export_text()
    assert "50.0% of tiles; table for 512 to 1024 keys" in said
    assert len(said.splitlines()) < 40
    by_head = copy.deepcopy(calibrated)
    modules = [module for _, module in sparse_modules(by_head)]
    table = methods(calibrated)[0].skip_softmax_threshold.table
    for scale, module in zip((2.0, 3.0, 4.0), modules, strict=True):
        factors = tuple(tuple((x * scale,) * 2 for x in row) for row in table.factors)
        other = CalibratedThreshold(
            target_sparsity=0.5, table=table.model_copy(update={"factors": factors})
        )
        config = module.method.config.with_thresholds({"prefill": other}, 512)
        module.method = type(module.method)(config)
    with console.capture() as said:
        mtsa.print_sparse_attention_summary(by_head, console)
    assert said.get().count("50.0% of tiles; table for") == 2 * LAYERS, said.get()


@pytest.mark.parametrize("preset", ["skip_softmax_calib", "flash_skip_softmax_calib"])
def test_presets_that_calibrate_ask_for_half_in_both_phases(preset):
    model = mtsa.sparsify(dense_model(), mtsa.PRESETS[preset], [source(1024)])
    for method in methods(model):
        for phase in ("prefill", "decode"):
            assert method.threshold(phase).target_sparsity == 0.5


def test_what_was_calibrated_is_saved_and_can_be_changed_afterwards(calibrated, tmp_path):
    model = copy.deepcopy(calibrated)
    mtsa.set_sparsity(model, {"prefill": 0.35})
    mtsa.save(model, tmp_path / "state")
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = mtsa.restore(dense_model(), tmp_path / "state")
    from_checkpoint = mtsa.from_pretrained(AutoModelForCausalLM, tmp_path / "checkpoint")
    pickled = pickle.loads(pickle.dumps(model))
    for other in (loaded, from_checkpoint, pickled):
        assert methods(other) == methods(model) != methods(calibrated)
        mtsa.set_sparsity(other, 0.5)
        assert methods(other) == methods(calibrated)
    assert torch.equal(loaded(source(700)).logits, calibrated(source(700)).logits)


def test_flash_skip_softmax_keeps_the_lambdas_that_it_counts():
    config = mtsa.SKIP_SOFTMAX_DEFAULT.with_rule(
        "*", thresholds={"prefill": [0.5, 0.1, 0.9], "decode": [0.2]}
    )
    model = mtsa.sparsify(dense_model(), config)
    mtsa.calibrate(model, {"target_sparse_ratio": {"prefill": 0.2}}, [source(1024)])
    thresholds = methods(model)[0].thresholds
    assert thresholds.prefill[1:] == (0.1, 0.9) and thresholds.decode == (0.2,)
    with torch.no_grad():
        model(source(1024))
    assert shares(model, "prefill") == pytest.approx(0.2, abs=0.01)


def test_a_target_of_0_makes_a_phase_dense(model):
    mtsa.calibrate(model, {**SMALL, "target_sparse_ratio": {"prefill": 0, "decode": 0.3}})
    plan = next(module for _, module in sparse_modules(model)).method.plan()
    assert plan.skip is None and plan.skip_decode is not None


def test_what_is_not_taken_says_so(model, calibrated):
    nm = mtsa.sparsify(dense_model(), mtsa.SPARSE_SOFTMAX_DEFAULT)
    with pytest.raises(ConfigError, match="triton_sparse_softmax; takes methods that skip"):
        mtsa.calibrate(nm, SMALL)
    with pytest.raises(ConfigError, match=r"calibration\.samples: got 0"):
        mtsa.calibrate(model, {"samples": 0})
    with pytest.raises(ConfigError, match="target_sparse_ratio"):
        mtsa.calibrate(model, {"target_sparse_ratio": 1.0})
    with pytest.raises(ConfigError, match="target"):
        mtsa.calibrate(model, {"target_error": {"prefill": True}})
    with pytest.raises(ArgumentTypeError, match="forward_loop: got 3"):
        mtsa.calibrate(model, SMALL, 3)
    for single in (source(600), {"input_ids": source(600)}):
        with pytest.raises(
            ArgumentTypeError, match=r"(?s)forward_loop: .* Put a single batch in a list"
        ):
            mtsa.calibrate(model, SMALL, single)
    with pytest.raises(ArgumentTypeError, match="a batch to calibrate with"):
        mtsa.calibrate(model, SMALL, ["text"])
    with pytest.raises(ArgumentTypeError, match="not empty"):
        mtsa.calibrate(model, SMALL, [torch.zeros(1, 0, dtype=torch.int64)])
    with pytest.raises(ConfigError, match=r"chunk_size: got 256; takes None where a function"):
        mtsa.calibrate(model, {"chunk_size": 256}, lambda m: m(source(600)))
    with pytest.raises(ConfigError, match="got no tokens in prefill"):
        mtsa.calibrate(model, SMALL, lambda m: None)
    with pytest.raises(ConfigError, match=r"config\.calibration: got None"):
        mtsa.calibrate(model, mtsa.SKIP_SOFTMAX_TRITON_DEFAULT)
    with pytest.raises(ConfigError, match="forward_loop: got one"):
        mtsa.sparsify(dense_model(), mtsa.SKIP_SOFTMAX_TRITON_DEFAULT, [source(600)])
    with pytest.raises(ConfigError, match="no calibrated threshold in prefill and decode"):
        mtsa.set_sparsity(model, 0.5)
    with pytest.raises(ConfigError, match="target"):
        mtsa.set_sparsity(calibrated, 1.5)
    mtsa.disable_sparse_attention(model)
    with pytest.raises(ConfigError, match="no enabled module"):
        mtsa.calibrate(model, SMALL)


def test_a_bidirectional_module_is_refused(model):
    (_, module), *_ = sparse_modules(model)
    module.is_causal = False
    with pytest.raises(UnsupportedCall, match="bidirectional"):
        mtsa.calibrate(model, SMALL, lambda m: m(source(600), attention_mask=None))


def test_prompts_are_no_longer_than_the_model_takes(model):
    """With the tokens that it writes; what is asked for in so many words isn't changed."""
    model.config.max_position_embeddings = 1030
    lengths = []

    def seen(_module, args, given):
        lengths.append(given["past_key_values"].get_seq_length() + args[0].shape[1])

    model.register_forward_pre_hook(seen, with_kwargs=True)
    one = {"samples": 1, "num_decode_tokens": 2}
    mtsa.calibrate(model, one)
    assert lengths == [1028, 1029, 1030]
    mtsa.check_calibration(model, None, one)
    assert max(lengths) == 1030
    with pytest.raises(ConfigError, match=r"calibration\.max_seqlen: got 1029; takes at most 1028"):
        mtsa.calibrate(model, {**one, "max_seqlen": 1029})
    model.config.max_position_embeddings = 40
    with pytest.raises(ConfigError, match=r"max_seqlen: got 38; takes at least \d+ tokens"):
        mtsa.calibrate(model, one)


def test_prompts_of_a_file_are_its_text_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "text.txt"
    config = CalibrationConfig(samples=1, tokenizer=str(MODEL), text_files=(str(path),))

    def made(content):
        path.write_bytes(content)
        return next(prompts(nn.Linear(1, 1), config))

    text = "naïve café " * 1000
    assert torch.equal(made(text.encode("utf-8-sig")), made(text.encode()))
    with pytest.raises(
        ConfigError, match=r"text_files: got '.*text\.txt', whose bytes aren't UTF-8"
    ):
        made(text.encode("latin-1"))


def test_tokens_that_the_model_does_not_know_are_refused():
    config = {"samples": 1, "max_seqlen": 1024, "tokenizer": str(MODEL)}
    model = mtsa.sparsify(tiny_llama(), mtsa.SKIP_SOFTMAX_TRITON_DEFAULT)
    with pytest.raises(ConfigError, match=r"tokenizer: got token \d+; takes one for this model"):
        mtsa.calibrate(model, config)


def test_prompts_have_the_lengths_asked_for_and_end_with_their_question():
    config = CalibrationConfig(samples=4, max_seqlen=4096, tokenizer=str(MODEL))
    found = list(prompts(nn.Linear(1, 1), config))
    assert [ids.shape[1] for ids in found] == [4096, 2048, 1024, 4096]
    text = AutoTokenizer.from_pretrained(MODEL).decode(found[0][0])
    assert "Some numbers are hidden" in text[:40] and text.endswith("? It is")
    assert not torch.equal(found[0], found[3])

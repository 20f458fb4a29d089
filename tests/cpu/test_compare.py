"""Dense against sparse: each number beside a plain computation of it, and a model left as it was."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import LlamaModel

import modelopt_sparse as mtsa
from modelopt_sparse.calls import AttentionCall
from modelopt_sparse.faithfulness import tokens
from modelopt_sparse.kernels import attention_reference
from modelopt_sparse.module import observed
from tests.cpu import tiny
from tests.cpu.tiny import ATTENTION, FLASH, NM, SKIP, config_of, logits, prompt

ROOT = Path(__file__).resolve().parents[2]


# Leaves so much out that predictions change.
COARSE = config_of(
    "flash_skip_softmax", thresholds={"prefill": [1.0], "decode": [1.0]}, br=16, bc=16
)


def sparse_llama(config=SKIP):
    """In float64, so that what is compared is equal but for the order of sums. Its heads differ."""
    model = tiny.tiny_llama().double()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data[16:] *= 0.8
    return mtsa.sparsify(model, config)


def padded(*lengths: int, side: str = "right"):
    """One prompt of each length, made one batch; and the prompts."""
    alone = [prompt(length, seed=seed) for seed, length in enumerate(lengths)]
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(alone):
        at = slice(0, text.shape[1]) if side == "right" else slice(-text.shape[1], None)
        ids[row, at], mask[row, at] = text[0], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, alone


def dense_and_sparse(model, ids):
    """Logits [T, V] of a prompt [1, T], of the model with and without its sparse attention."""
    mtsa.disable_sparse_attention(model)
    dense = logits(model, ids)[0]
    mtsa.enable_sparse_attention(model)
    return dense, logits(model, ids)[0]


def assert_alike(a, b):
    """Two comparisons of the same tokens; how tokens came in batches is all that may differ."""

    def numbers(value):
        if isinstance(value, dict):
            return {key: numbers(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [numbers(entry) for entry in value]
        return pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value

    assert a.to_dict() == numbers(b.to_dict())


def test_where_nothing_is_skipped_nothing_differs():
    config = config_of("triton_skip_softmax", skip_softmax_threshold=1e-30)
    found = mtsa.compare(sparse_llama(config), [prompt()])
    assert (found.tokens, found.sequences, found.sparsity) == (tiny.LENGTH - 1, 1, 0)
    assert found.agreement.value == 1
    assert found.agreement.interval[1] == 1
    zeros = [found.kl_bits.value, found.bits_difference.value, *found.bits_difference.interval]
    for module in found.modules.values():
        assert module.prefill.dropped_mass.max.overall == 0
        assert module.prefill.dropped_mass_bound.max.overall == 0
        zeros += module.prefill.relative_error.heads
    assert zeros == pytest.approx([0] * len(zeros), abs=1e-12)
    assert found.dense_bits == pytest.approx(found.sparse_bits, abs=1e-12) and found.dense_bits > 0


def test_tokens_are_scored_as_the_logits_of_both_say():
    model = sparse_llama(COARSE)
    prompts = [prompt(300), prompt(200, seed=1)]
    pairs = [dense_and_sparse(model, ids) for ids in prompts]
    dense, sparse = (torch.cat([x[:-1] for x in side]) for side in zip(*pairs, strict=True))
    came = torch.cat([ids[0, 1:] for ids in prompts])
    bits = [F.cross_entropy(x, came).item() / math.log(2) for x in (dense, sparse)]
    divergence = F.kl_div(
        sparse.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none"
    )
    agreement = (dense.argmax(-1) == sparse.argmax(-1)).double().mean()

    found = mtsa.compare(model, prompts)
    assert (found.tokens, found.sequences, found.clusters) == (498, 2, 2)
    assert [found.dense_bits, found.sparse_bits] == pytest.approx(bits, rel=1e-9)
    assert found.bits_difference.value == pytest.approx(bits[1] - bits[0], rel=1e-6)
    assert found.kl_bits.value == pytest.approx(
        divergence.sum(1).mean().item() / math.log(2), rel=1e-9
    )
    assert found.agreement.value == pytest.approx(agreement.item())
    # The prompts skip enough for these to say something.
    assert abs(bits[1] - bits[0]) > 1e-6 and found.kl_bits.value > 1e-6 and agreement < 1
    for estimate in (found.bits_difference, found.kl_bits, found.agreement):
        low, high = estimate.interval
        assert low < estimate.value < high


@pytest.mark.parametrize("at_a_time", [1, 64 * 7, 2**22])
def test_logits_are_compared_in_parts(monkeypatch, at_a_time):
    model = sparse_llama()
    wanted = mtsa.compare(model, [prompt()])
    monkeypatch.setattr(tokens, "LOGITS", at_a_time)
    assert_alike(mtsa.compare(model, [prompt()]), wanted)


def test_a_token_that_both_rule_out_adds_nothing():
    dense, sparse = torch.randn(2, 5, 16)
    dense[:, 3] = sparse[:, 3] = -torch.inf
    found = tokens._scores(dense, sparse, torch.zeros(5))
    others = [x[:, [*range(3), *range(4, 16)]] for x in (dense, sparse)]
    torch.testing.assert_close(found, tokens._scores(*others, torch.zeros(5)))


@pytest.mark.parametrize("config", [SKIP, FLASH], ids=["skip", "flash counts more"])
def test_tiles_are_those_of_the_sparse_model(config):
    model = sparse_llama(config)
    found = mtsa.compare(model, [prompt(), prompt(seed=1)])
    for seed in range(2):
        logits(model, prompt(seed=seed))
    stats = {name: entry["prefill"] for name, entry in mtsa.get_stats(model).items()}
    for name, data in stats.items():
        assert data["calls"] == 2
        sparsity = found.modules[name].prefill.sparsity
        assert sparsity.overall == pytest.approx(data["sparsity"]) and sparsity.overall > 0
        by_head = [s / v for s, v in zip(data["skipped"], data["visible"], strict=True)]
        assert sparsity.heads == pytest.approx(by_head)
    totals = [sum(sum(data[key]) for data in stats.values()) for key in ("skipped", "visible")]
    assert found.sparsity == pytest.approx(totals[0] / totals[1])


@pytest.mark.parametrize("config", [SKIP, FLASH, NM], ids=["skip", "flash", "nm"])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_error_of_a_module_is_that_of_its_output_on_dense_inputs(config, layer):
    model = sparse_llama(config)
    taken = []
    attention = model.model.layers[layer].self_attn
    mtsa.disable_sparse_attention(model)
    handle = attention.o_proj.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    logits(model)
    # Alone enabled, it gets what the dense model gives it.
    mtsa.enable_sparse_attention(model, ATTENTION[layer])
    logits(model)
    handle.remove()
    mtsa.enable_sparse_attention(model)
    dense, sparse = (x.unflatten(-1, (2, -1)) for x in taken)
    wanted = [((sparse - dense).norm() / dense.norm()).item()]
    wanted += [((sparse - dense)[:, :, h].norm() / dense[:, :, h].norm()).item() for h in range(2)]
    error = mtsa.compare(model, [prompt()]).modules[ATTENTION[layer]].prefill.relative_error
    assert [error.overall, *error.heads] == pytest.approx(wanted, rel=1e-9)
    assert min(wanted) > 1e-5 and wanted[1] != pytest.approx(wanted[2], rel=0.01)


def test_dropped_mass_is_what_the_reference_says_of_the_same_call():
    model = sparse_llama()
    seen: list[AttentionCall] = []

    def see(call, plan):
        seen.append(call)
        return call(plan)

    module = model.get_submodule(ATTENTION[0])
    prompts = [prompt(), prompt(200, seed=1)]
    with observed({module: see}):
        for ids in prompts:
            logits(model, ids)
    plan = module.method.plan()
    outputs = [
        attention_reference(c.q, c.k, c.v, c.seqs, **c.options, plan=plan, details=True)
        for c in seen
    ]
    found = mtsa.compare(model, prompts).modules[ATTENTION[0]].prefill
    assert found.rows == 500
    for name in ("dropped_mass", "dropped_mass_bound"):
        mass = torch.cat([getattr(output, name) for output in outputs])  # [500, 2]
        ours = getattr(found, name)
        assert ours.mean.overall == pytest.approx(mass.mean().item())
        assert ours.mean.heads == pytest.approx(mass.mean(0).tolist())
        assert ours.max.overall == pytest.approx(mass.max().item())
        assert ours.max.heads == pytest.approx(mass.amax(0).tolist())
        assert 0 < ours.mean.overall < ours.max.overall < 1
        assert ours.mean.heads[0] != pytest.approx(ours.mean.heads[1], rel=0.01)
    assert found.dropped_mass.mean.overall < found.dropped_mass_bound.mean.overall


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_prompts_alone(side):
    model = sparse_llama(COARSE)
    batch, alone = padded(300, 170, 210, side=side)
    together, apart = mtsa.compare(model, [batch]), mtsa.compare(model, alone)
    assert (together.tokens, together.sequences) == (299 + 169 + 209, 3)
    assert together.modules[ATTENTION[0]].prefill.rows == 300 + 170 + 210
    assert_alike(together, apart)
    assert together.kl_bits.value > 0


def test_what_a_mask_hides_in_the_middle_is_neither_predicted_nor_predicts():
    ids, mask = prompt(), torch.ones_like(prompt())
    mask[0, 100:110] = 0
    found = mtsa.compare(sparse_llama(), [{"input_ids": ids, "attention_mask": mask}])
    assert found.tokens == 299 - 11


def test_with_one_sequence_intervals_are_over_blocks_of_it():
    model = sparse_llama(COARSE)
    found = mtsa.compare(model, [prompt()])
    assert (found.sequences, found.clusters) == (1, 299 // 16)
    short = mtsa.compare(model, [prompt(20)])
    assert (short.clusters, short.kl_bits.interval, short.bits_difference.interval) == (
        1,
        None,
        None,
    )
    wide = mtsa.compare(model, [prompt()], confidence=0.99)
    for name in ("bits_difference", "kl_bits", "agreement"):
        (low, high), (lower, higher) = getattr(found, name).interval, getattr(wide, name).interval
        assert lower < low < high < higher


def test_disabled_modules_are_dense_in_both_passes():
    model = sparse_llama()
    both = mtsa.compare(model, [prompt()])
    mtsa.disable_sparse_attention(model, ATTENTION[0])
    found = mtsa.compare(model, [prompt()])
    assert list(found.modules) == [ATTENTION[1]]
    # Its own error doesn't depend on the layer before; what the logits say does.
    ours, theirs = (x.modules[ATTENTION[1]].prefill.relative_error for x in (found, both))
    assert ours == theirs
    assert found.dense_bits == both.dense_bits and found.sparse_bits != both.sparse_bits
    assert [entry["enabled"] for entry in mtsa.get_stats(model).values()] == [False, True]


def test_methods_without_tiles_have_an_error_and_no_dropped_mass():
    found = mtsa.compare(sparse_llama(NM), [prompt()])
    assert found.sparsity is None
    for module in found.modules.values():
        assert (module.prefill.sparsity, module.prefill.dropped_mass) == (None, None)
        assert module.prefill.relative_error.overall > 0


def test_sequences_below_min_context_drop_nothing_and_count_in_the_mean():
    config = config_of("triton_skip_softmax", skip_softmax_threshold=0.1, min_context=250)
    model, plain = sparse_llama(config), sparse_llama()
    short, long = prompt(200), prompt(300)
    assert mtsa.compare(model, [short]).modules[ATTENTION[0]].prefill.dropped_mass.max.overall == 0
    both = mtsa.compare(model, [short, long]).modules[ATTENTION[0]].prefill
    alone = mtsa.compare(plain, [long]).modules[ATTENTION[0]].prefill
    assert both.sparsity == alone.sparsity
    assert both.dropped_mass.max == alone.dropped_mass.max
    mean = alone.dropped_mass.mean.overall * 300 / 500
    assert both.dropped_mass.mean.overall == pytest.approx(mean)


def test_rows_of_each_phase_are_told_apart():
    positions = torch.cat([torch.arange(297), torch.zeros(3, dtype=torch.int64)])[None]
    found = mtsa.compare(sparse_llama(), [{"input_ids": prompt(), "position_ids": positions}])
    for module in found.modules.values():
        assert (module.prefill.rows, module.decode.rows) == (297, 3)
        assert module.prefill.dropped_mass.max.overall > 0
        assert module.decode.relative_error.overall == 0


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_crash_leaves_the_model_as_it_was(call):
    model = sparse_llama()
    mtsa.disable_sparse_attention(model, ATTENTION[0])
    logits(model)
    modules = [model.get_submodule(name) for name in ATTENTION]
    before, stats = [dict(module.__dict__) for module in modules], mtsa.get_stats(model)
    calls = []

    def crash(*_):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("crash")

    handle = model.model.layers[1].mlp.register_forward_hook(crash)
    with pytest.raises(RuntimeError, match="crash"):
        mtsa.compare(model, [prompt(), prompt(seed=1)])
    handle.remove()
    assert [module.__dict__ for module in modules] == before
    assert all(module.stats is old["stats"] for module, old in zip(modules, before, strict=True))
    assert mtsa.get_stats(model) == stats
    assert stats[ATTENTION[1]]["prefill"]["calls"] == 1


def test_a_comparison_leaves_the_model_as_it_was():
    model = sparse_llama()
    logits(model)
    stats = mtsa.get_stats(model)
    before = tiny.snapshot(model)
    mtsa.compare(model, [prompt()])
    assert mtsa.get_stats(model) == stats
    assert tiny.snapshot(model) == before
    assert torch.is_grad_enabled() and not model.training


def test_batches_are_taken_one_by_one():
    model = sparse_llama()
    asked, ran = [], []
    model.register_forward_hook(lambda *_: ran.append(len(asked)))

    def batches():
        for seed in range(3):
            asked.append(seed)
            yield prompt(50, seed=seed)

    assert mtsa.compare(model, batches()).sequences == 3
    assert ran == [1, 1, 2, 2, 3, 3]


REFUSED_INPUTS = {
    "a tensor": (prompt(50), TypeError, "inputs: got a Tensor.*in a list"),
    "a mapping": ({"input_ids": prompt(50)}, TypeError, "inputs: got a dict.*in a list"),
    "a text": ("text", TypeError, "inputs: got a str"),
    "none": (None, TypeError, "inputs: got a NoneType"),
    "nothing": ([], ValueError, "inputs: got no batches"),
    "a batch of text": ([prompt(50), "text"], TypeError, r"inputs\[1\]: got a str"),
    "no ids": ([{"attention_mask": torch.ones(1, 9)}], TypeError, r"input_ids: got None"),
    "lists": ([{"input_ids": [[1, 2]]}], TypeError, r'got a list.*return_tensors="pt"'),
    "floats": ([torch.ones(1, 9)], ValueError, "input_ids: got torch.float32"),
    "one dimension": ([prompt(50)[0]], ValueError, r"input_ids: got torch.int64 \[50\]"),
    "an empty batch": ([prompt(50)[:0]], ValueError, r"\[0, 50\].*not empty"),
    "one token": ([prompt(1)], ValueError, r"inputs\[0\]: got a sequence of less than two tokens"),
    "one token and padding": (
        [{"input_ids": prompt(3), "attention_mask": torch.tensor([[1, 0, 0]])}],
        ValueError,
        "less than two tokens",
    ),
    "a mask of a list": (
        [{"input_ids": prompt(3), "attention_mask": [[1, 1, 1]]}],
        TypeError,
        "attention_mask: got a list",
    ),
    "a mask of four dimensions": (
        [{"input_ids": prompt(3), "attention_mask": torch.ones(1, 1, 3, 3)}],
        ValueError,
        r"attention_mask: got shape \[1, 1, 3, 3\]",
    ),
    **{
        f"{key} {value}": (
            [{"input_ids": prompt(3), key: value}],
            NotImplementedError,
            rf"inputs\[0\]: got {key}; takes no argument that compare gives",
        )
        for key, value in (
            ("past_key_values", "a cache"),
            ("past_key_values", None),
            ("use_cache", False),
            ("return_dict", True),
        )
    },
}


@pytest.mark.parametrize("case", REFUSED_INPUTS)
def test_inputs_that_are_not_taken_are_refused_by_name(case):
    inputs, error, message = REFUSED_INPUTS[case]
    with pytest.raises(error, match=message) as caught:
        mtsa.compare(sparse_llama(), inputs)
    assert isinstance(caught.value, mtsa.SparseAttentionError)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, "0.9", None, float("nan")])
def test_a_confidence_is_between_0_and_1(confidence):
    with pytest.raises(mtsa.ArgumentError, match="confidence"):
        mtsa.compare(sparse_llama(), [prompt(50)], confidence=confidence)


def test_models_that_can_not_be_compared_are_refused():
    dense = tiny.tiny_llama()
    with pytest.raises(mtsa.ArgumentError, match=r"no enabled sparse module.*sparsify"):
        mtsa.compare(dense, [prompt(50)])
    model = sparse_llama()
    with pytest.raises(mtsa.ArgumentError, match=r"no enabled sparse module.*enable_sparse"):
        mtsa.compare(mtsa.disable_sparse_attention(model), [prompt(50)])
    mtsa.enable_sparse_attention(model).train()
    with pytest.raises(mtsa.ArgumentError, match=r"training mode.*model\.eval"):
        mtsa.compare(model, [prompt(50)])
    assert model.training
    model.eval().set_attn_implementation("sdpa")
    with pytest.raises(mtsa.ArgumentError, match="called no sparse module"):
        mtsa.compare(model, [prompt(50)])
    other = sparse_llama()
    other.config.is_encoder_decoder = True
    with pytest.raises(mtsa.UnsupportedModel, match="an encoder and a decoder"):
        mtsa.compare(other, [prompt(50)])
    headless = mtsa.sparsify(LlamaModel(tiny.tiny_config()).eval(), SKIP)
    with pytest.raises(mtsa.UnsupportedModel, match="logits are none"):
        mtsa.compare(headless, [prompt(50)])
    with pytest.raises(mtsa.UnsupportedModel, match=r"logits are \[1, 1, 64\]"):
        mtsa.compare(sparse_llama(), [{"input_ids": prompt(50), "logits_to_keep": 1}])


def test_a_comparison_is_plain_data_and_back():
    found = mtsa.compare(sparse_llama(), [prompt(), prompt(100)])
    data = found.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert mtsa.Comparison.model_validate(data) == found
    with pytest.raises(ValueError, match="frozen"):
        found.tokens = 1


def test_the_tables_say_what_was_found():
    found = mtsa.compare(sparse_llama(), [prompt()])
    console = Console(record=True, width=80, file=StringIO())
    found.print(console)
    text = console.export_text()
    assert "…" not in text
    assert "299 tokens of 1 sequence" in text and f"{found.sparsity:.1%} of tiles skipped" in text
    for bits in (found.dense_bits, found.sparse_bits):
        assert f"{bits:.4f}" in text
    assert f"{found.bits_difference.value:+.4f}" in text
    assert f"{found.agreement.interval[0]:.2%} to {found.agreement.interval[1]:.2%}" in text
    for name in ATTENTION:
        prefill = found.modules[name].prefill
        assert name in text and f"{prefill.sparsity.overall:.1%}" in text
        assert f"{max(prefill.relative_error.heads):.2%}" in text
        assert f"{prefill.dropped_mass.mean.overall:.2%}" in text
        assert f"{prefill.dropped_mass_bound.max.overall:.2%}" in text
    with pytest.raises(mtsa.ArgumentTypeError, match="console"):
        found.print("out")


def test_what_could_not_be_told_is_a_dash(capsys):
    mtsa.compare(sparse_llama(NM), [prompt(20)]).print()
    text = capsys.readouterr().out
    assert "no tiles were counted" in text
    assert "KL" in text and "-" in text.split("KL")[1].splitlines()[0]


def test_the_readme_shows_a_model_that_stays_close_to_dense(monkeypatch):
    section = (ROOT / "README.md").read_text().split("## What skipping costs")[1]
    monkeypatch.chdir(ROOT)
    names = {}
    exec(section.split("```python")[1].split("```")[0], names)
    found = names["found"]
    assert found.tokens >= 1023 and found.sparsity > 0.2
    assert abs(found.bits_difference.value) < 0.02 and found.agreement.value > 0.95
    for module in found.modules.values():
        mass = module.prefill.dropped_mass
        assert 0 <= mass.mean.overall < mass.max.overall < 1
        assert 0 < module.prefill.relative_error.overall < 0.2

"""The benchmark: small cases run, wrong results are not timed, and the dial of its inputs is exact."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modelopt_sparse.bench import (
    __main__,
    baselines,
    decode_step,
    measure,
    packages,
    report,
    serving,
    timing,
    whole_model,
)
from modelopt_sparse.bench import cases as bench_cases
from modelopt_sparse.bench.__main__ import main
from modelopt_sparse.bench.captured import Source, capture, captured_cases
from modelopt_sparse.bench.case import OWN_DENSE, Check, Setting
from modelopt_sparse.bench.checks import forward_error
from modelopt_sparse.bench.decode_step import small_step_cases, step_cases
from modelopt_sparse.bench.inputs import (
    KEYS,
    ROWS,
    THRESHOLD,
    Shape,
    dialled,
    greatest_share,
    plain,
)
from modelopt_sparse.bench.run import Row
from modelopt_sparse.bench.serving import caches, serving_cases, small_serving_cases
from modelopt_sparse.bench.suites import smoke_cases, standard_cases
from modelopt_sparse.bench.timing import FULL, QUICK, Effort, Times, rounds_of, times_in_turn
from modelopt_sparse.bench.whole_model import small_whole_model_cases, whole_model_cases
from modelopt_sparse.errors import ArgumentError
from modelopt_sparse.integrations import module_call
from modelopt_sparse.kernels import (
    PagedKV,
    Phase,
    Plan,
    Seqs,
    SkipSoftmax,
    SkipSoftmaxDecode,
    attention_paged,
    attention_reference,
)

CPU = torch.device("cpu")
BRIEF = Effort(0.0, 1, 1)
SMALL = Setting(CPU, torch.float32, Shape(2, 1, 32))


def case_named(name):
    return next(case for case in smoke_cases() if case.name == name)


@pytest.mark.parametrize(
    ("length", "share", "shape"),
    [
        (2048, 0.5, Shape(2, 1, 128)),
        (2048, 0.75, Shape(4, 2, 64)),
        (1990, 0.6, Shape(2, 2, 32)),
        (2048, 0.0, Shape(2, 1, 128)),
    ],
    ids=lambda value: str(value),
)
def test_the_reference_skips_the_dialled_share_and_no_other_tiles(length, share, shape):
    inputs = dialled(length, share, shape, CPU, torch.bfloat16)
    q, k, v = (x.float() for x in (inputs.q, inputs.k, inputs.v))
    plan = Plan(skip=SkipSoftmax(THRESHOLD))
    output = attention_reference(q, k, v, inputs.seqs, plan=plan, details=True)
    counted = output.prefill.skipped[0].double() / output.prefill.visible
    assert (counted - share).abs().max() < 0.03, counted

    row_tiles = -(-length // ROWS)
    expected = inputs.kept.repeat_interleave(KEYS // ROWS, 1)[:, :row_tiles]
    expected = expected.repeat_interleave(inputs.group, 0)
    assert torch.equal(output.kept[0], expected)


@pytest.mark.parametrize("length", [16384, 65536])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_dial_is_exact_on_long_sequences_for_every_head(length, share):
    kept = dialled(length, share, Shape(2, 2, 64), CPU, torch.bfloat16).kept
    visible = torch.ones_like(kept[0]).tril().sum()
    skipped = 1 - kept.sum((1, 2)) / visible
    assert (skipped - share).abs().max() < 0.01, skipped


def test_heads_may_skip_unevenly():
    inputs = dialled(2048, [0.1, 0.7], Shape(4, 2, 64), CPU, torch.float32)
    plan = Plan(skip=SkipSoftmax(THRESHOLD))
    output = attention_reference(inputs.q, inputs.k, inputs.v, inputs.seqs, plan=plan)
    counted = output.prefill.skipped[0].double() / output.prefill.visible
    torch.testing.assert_close(
        counted.float(), torch.tensor([0.1, 0.1, 0.7, 0.7]), atol=0.03, rtol=0
    )
    assert inputs.share == pytest.approx(0.4)
    with pytest.raises(ArgumentError, match="one for each of the 2 KV heads"):
        dialled(2048, [0.1], Shape(4, 2, 64), CPU, torch.float32)


def test_one_hot_row_keeps_a_tile_that_the_others_do_not_need():
    shape = Shape(2, 1, 64)
    inputs = dialled(2048, 0.7, shape, CPU, torch.float32, has_hot_rows=True)
    plan = Plan(skip=SkipSoftmax(THRESHOLD))
    tensors = inputs.q, inputs.k, inputs.v, inputs.seqs
    assert not attention_reference(*tensors, plan=plan).prefill.skipped.any()
    alone = Plan(skip=SkipSoftmax(THRESHOLD, block_rows=16))
    counted = attention_reference(*tensors, plan=alone).prefill
    assert counted.skipped[0].sum() / counted.visible.sum() > 0.4
    assert inputs.share == 0


def test_heads_differ_in_what_is_cold():
    kept = dialled(4096, 0.5, Shape(2, 2, 32), CPU, torch.bfloat16).kept
    assert not torch.equal(kept[0], kept[1])


def test_equal_seeds_give_equal_inputs():
    first, second, other = (
        dialled(512, 0.2, Shape(2, 1, 32), CPU, torch.float32, s) for s in (0, 0, 1)
    )
    assert torch.equal(first.q, second.q)
    assert not torch.equal(first.q, other.q)


def test_a_share_that_cannot_be_reached_is_an_error():
    assert greatest_share(128) == 0
    assert 0.7 < greatest_share(2048) < 0.9 < greatest_share(16384)
    for share in (0.95, -0.1, float("nan")):
        with pytest.raises(ArgumentError, match=r"share.*Give a longer sequence"):
            dialled(2048, share, Shape(2, 1, 32), CPU, torch.float32)


def test_the_smoke_run_checks_and_times_every_kind_of_case(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert main(["--smoke", "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    assert data["environment"]["torch"] == torch.__version__
    every = standard_cases() + serving_cases() + step_cases() + whole_model_cases()
    assert {row["group"] for row in data["rows"]} == {case.group for case in every}
    for row in data["rows"]:
        assert not row["failed"]
        assert row["ratio"] == pytest.approx(row["theirs"]["median"] / row["ours"]["median"])
        assert row["error"] < 1e-4
    skipped = {row["case"]: row["sparsity"] for row in data["rows"]}
    assert skipped["skip50-1k"] == pytest.approx(0.5, abs=0.03)
    assert skipped["decode-skip50-2x8k"] == pytest.approx(0.5, abs=0.03)
    assert skipped["skip0-200"] == 0
    assert skipped["dense-200"] is None
    assert "own dense" in capsys.readouterr().out


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_tells_how_many_cases_are_done_and_no_thread_draws_it(
    is_terminal, monkeypatch, capsys
):
    threads = set()

    def measured(*args):
        threads.update(type(thread).__module__ for thread in threading.enumerate())
        return measure(*args)

    monkeypatch.setattr(__main__, "measure", measured)
    for variable, value in (("TERM", "xterm"), ("FORCE_COLOR", "1"), ("COLUMNS", "200")):
        monkeypatch.delenv(variable, raising=False)
        if is_terminal:
            monkeypatch.setenv(variable, value)
    assert main(["--smoke", "--only", "dense-200", "--only", "skip0-200"]) == 0
    found = capsys.readouterr()
    assert ("cases" in found.err and " 50%" in found.err and "100%" in found.err) is is_terminal
    assert "dense-200" in found.out and "skip0-200" in found.out and "cases" not in found.out
    assert threads and not any(name.startswith("rich") for name in threads)


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_an_interrupt_while_rows_are_written_leaves_those_before(kind, tmp_path, monkeypatch):
    path = tmp_path / f"rows.{kind}"
    path.write_text("before")
    row = Row("dense", "dense-200", "peer")

    def half(self, text):
        with self.open("w") as file:
            file.write(text[:9])
        raise KeyboardInterrupt

    def rows():
        yield row
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        report.save(path, {}, [row]) if kind == "json" else report.save_csv(path, rows())
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_cases_are_chosen_by_group_and_by_name(capsys):
    assert main(["--list", "--only", "nm", "--only", "skip75", "--without", "others"]) == 0
    lines = capsys.readouterr().out.split("\n")[:-1]
    assert lines == [
        "skip: skip75-16k",
        *(f"nm: nm{a}-{n}" for a in ("2:4", "4:8") for n in ("4k", "16k")),
        "chunk: chunk-skip75-2k-of-32k",
    ]
    assert main(["--only", "no such case"]) == 2
    assert "--list" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_caches_have_the_dialled_share_and_lose_nothing_that_matters(share):
    inputs = caches(3, 8192, share, replace(SMALL, shape=Shape(4, 2, 64)))
    found = inputs.call(Plan(skip_decode=SkipSoftmaxDecode(THRESHOLD)), inputs.seqs, details=True)
    counted = found.decode.skipped[0].double() / found.decode.visible
    assert (counted - share).abs().max() < 0.03, counted
    assert found.dropped_mass.max() < 0.05
    assert inputs.error(found.out, found.kept) < 1e-5


def test_a_wrong_decode_is_reported_and_not_timed(monkeypatch):
    real = serving.attention_varlen

    def off(*args, **options):
        found = real(*args, **options)
        return replace(found, out=found.out * 1.5)

    monkeypatch.setattr(serving, "attention_varlen", off)
    for case in small_serving_cases()[:2]:
        (row,) = measure(case, SMALL, BRIEF)
        assert row.failed and "FAILED: error 0." in row.note


def test_a_step_is_set_beside_transformers_own_and_beside_attention_alone():
    mine, alone = measure(small_step_cases()[0], SMALL, BRIEF)
    assert (mine.peer, alone.peer) == (decode_step.TRANSFORMERS, decode_step.ALONE)
    outside = 1000 * (alone.ours.median - alone.theirs.median) / 2
    assert alone.note == f"{outside:.1f} us a layer outside of it"
    assert mine.note == "" and mine.error < 1e-5


@pytest.mark.parametrize("where", ["module_call", "alone"])
def test_a_wrong_step_is_reported_and_not_timed(where, monkeypatch):
    owner = decode_step if where == "alone" else module_call
    real = owner.attention_varlen

    def without_some_keys(*args, bounds, **options):
        return real(*args, bounds=bounds - torch.tensor([0, 30], dtype=torch.int32), **options)

    monkeypatch.setattr(owner, "attention_varlen", without_some_keys)
    (row,) = measure(small_step_cases()[0], SMALL, BRIEF)
    assert row.failed
    assert ("attention alone is off" in row.note) == (where == "alone")


def test_a_step_takes_the_same_token_each_time():
    step = decode_step.Step(40, decode_step.Size(2, 48, 100), SMALL)
    first, second = (step.logits("sdpa").clone() for _ in range(2))
    assert torch.equal(first, second)
    assert step.filled.tolist() == [40, 40]
    last = [layer.keys[:, :, -1].clone() for layer in step.cache.layers]
    step.logits(decode_step.ATTENTION_NAME)
    for layer, before in zip(step.cache.layers, last, strict=True):
        torch.testing.assert_close(layer.keys[:, :, -1], before)
        assert before.abs().sum() > 0


@pytest.mark.parametrize("case", small_whole_model_cases(), ids=lambda case: case.name)
def test_a_model_attends_to_topics_and_skips_the_others(case, monkeypatch):
    rows = measure(case, SMALL, BRIEF)
    peers = [(row.peer, row.is_rival) for row in rows]
    assert peers == [(decode_step.TRANSFORMERS, True), (OWN_DENSE, False)]
    for row in rows:
        assert row.ratio > 0 and row.error < 1e-3 and 0.3 < row.sparsity <= 0.5

    monkeypatch.setattr(whole_model, "THRESHOLD", 1e-30)
    (row,) = measure(case, SMALL, BRIEF)
    assert row.failed and "skipped 0.0% of tiles, and 50% are of other topics" in row.note


@pytest.mark.parametrize("case", small_whole_model_cases(), ids=lambda case: case.name)
def test_wrong_logits_of_a_model_are_not_timed(case, monkeypatch):
    real = module_call.attention_varlen

    def twice(*args, **options):
        output = real(*args, **options)
        return replace(output, out=2 * output.out)

    monkeypatch.setattr(module_call, "attention_varlen", twice)
    (row,) = measure(case, SMALL, BRIEF)
    assert row.failed and "is above 0.05" in row.note


def test_names_of_cases_are_unique():
    every = standard_cases() + serving_cases() + step_cases() + whole_model_cases()
    small = smoke_cases() + small_serving_cases() + small_step_cases() + small_whole_model_cases()
    for cases in (every, small):
        assert len({case.name for case in cases}) == len(cases)


def with_output(monkeypatch, change):
    """Our calls return what `change` makes of their output."""
    real = bench_cases.attention_varlen
    monkeypatch.setattr(
        bench_cases, "attention_varlen", lambda *args, **options: change(real(*args, **options))
    )


def test_a_wrong_result_is_reported_and_not_timed(monkeypatch):
    def last_row_off(output):
        out = output.out.clone()
        out[-1] *= 1.5
        return replace(output, out=out)

    with_output(monkeypatch, last_row_off)
    (row,) = measure(case_named("dense-200"), SMALL, BRIEF)
    assert row.failed
    assert row.ratio is row.ours is None
    assert "FAILED: error 0." in row.note


def test_a_result_that_is_not_finite_is_wrong(monkeypatch):
    with_output(monkeypatch, lambda output: replace(output, out=output.out * torch.nan))
    (row,) = measure(case_named("dense-200"), SMALL, BRIEF)
    assert row.failed
    assert not Check(float("nan"), 1.0).passed


def test_a_mask_where_there_is_none_is_wrong(monkeypatch):
    real = bench_cases.attention_varlen
    monkeypatch.setattr(
        bench_cases,
        "attention_varlen",
        lambda *args, **options: real(*args, **{**options, "causal": True}),
    )
    (row,) = measure(case_named("full-200"), SMALL, BRIEF)
    assert row.failed


@pytest.mark.parametrize("name", ["chunk-dense-128-of-1k", "chunk-skip50-128-of-1k"])
def test_a_wrong_row_of_a_chunk_is_reported(name, monkeypatch):
    assert not any(row.failed for row in measure(case_named(name), SMALL, BRIEF))

    def last_row_off(output):
        out = output.out.clone()
        out[-1] *= 1.5
        return replace(output, out=out)

    with_output(monkeypatch, last_row_off)
    assert measure(case_named(name), SMALL, BRIEF)[0].failed


def test_a_chunk_counts_the_operations_of_its_rows():
    whole, part = (
        case_named(name).build(SMALL).flops for name in ("dense-200", "chunk-dense-128-of-1k")
    )
    assert part / (1024**2 - 896**2) == pytest.approx(whole / 200**2)


def test_counts_that_do_not_fit_the_tiles_are_wrong(monkeypatch):
    def one_less(output):
        counts = output.prefill
        return (
            output
            if counts is None
            else replace(output, prefill=replace(counts, skipped=counts.skipped - 1))
        )

    with_output(monkeypatch, one_less)
    (row,) = measure(case_named("skip50-1k"), SMALL, BRIEF)
    assert row.failed
    assert "tiles kept" in row.note


def test_a_share_far_from_the_dial_is_wrong(monkeypatch):
    monkeypatch.setattr(bench_cases, "THRESHOLD", 1e-30)
    (row,) = measure(case_named("skip50-1k"), SMALL, BRIEF)
    assert row.failed
    assert "dialled 50%" in row.note


def test_tiles_that_were_kept_and_left_out_show_in_the_error():
    inputs = dialled(1024, 0.5, Shape(2, 1, 32), CPU, torch.float32)
    output = attention_reference(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.seqs,
        plan=Plan(skip=SkipSoftmax(THRESHOLD)),
        details=True,
    )
    (kept,) = output.kept
    assert forward_error(inputs, output.out, [kept]) < 1e-5
    without_first = kept.clone()
    without_first[:, 2:, 0] = False
    assert forward_error(inputs, output.out, [without_first]) > 0.01


def test_a_case_that_raises_is_a_row(monkeypatch):
    def broken(output):
        raise RuntimeError("no such kernel\nat all")

    with_output(monkeypatch, broken)
    (row,) = measure(case_named("nm2:4-200"), SMALL, BRIEF)
    assert row.failed
    assert row.note == "FAILED: RuntimeError: no such kernel"


def test_a_peer_that_is_missing_or_wrong_is_named_and_the_others_timed(monkeypatch):
    def peers(inputs, names, mode="forward"):
        def missing():
            raise baselines.Unavailable("not installed")

        def too_large():
            raise torch.OutOfMemoryError("a traceback of allocations")

        right = baselines.sdpa(inputs, None, mode)
        return {
            "missing": missing,
            "too large": too_large,
            "wrong": lambda: baselines.Peer(right.run, lambda: right.output() * 1.1),
            "right": lambda: right,
        }

    monkeypatch.setattr(bench_cases, "_sdpa_peers", peers)
    rows = {row.peer: row for row in measure(case_named("dense-200"), SMALL, BRIEF)}
    assert rows["missing"].note == "n/a: not installed"
    assert rows["too large"].note == "n/a: the device has not the memory for it"
    assert rows["wrong"].note == "n/a: its result is off by 0.100"
    assert rows["missing"].ratio is rows["wrong"].ratio is None
    assert rows["right"].ratio > 0
    assert not any(row.failed for row in rows.values())


def test_heads_are_repeated_where_a_backend_does_not_share_them(monkeypatch):
    real = baselines.scaled_dot_product_attention

    def no_sharing(*args, enable_gqa, **options):
        if enable_gqa:
            raise RuntimeError("No available kernel.\nmore")
        return real(*args, **options)

    inputs = plain([40, 9], Shape(4, 2, 16), CPU, torch.float32)
    native = baselines.sdpa(inputs, None)
    monkeypatch.setattr(baselines, "scaled_dot_product_attention", no_sharing)
    repeated = baselines.sdpa(inputs, None)
    assert (native.note, repeated.note) == (
        "one call a sequence",
        "KV heads repeated, one call a sequence",
    )
    assert forward_error(inputs, repeated.output()) < 1e-5


def test_a_backend_that_cannot_run_here_is_unavailable():
    inputs = plain([40], Shape(2, 1, 16), CPU, torch.float32)
    with pytest.raises(baselines.Unavailable):
        baselines.sdpa(inputs, baselines.SDPBackend.CUDNN_ATTENTION)
    with pytest.raises(baselines.Unavailable):
        baselines.flash_varlen(inputs)


@pytest.mark.parametrize("form", ["shares heads", "causal flag"])
def test_packed_flash_attention_is_called_as_its_version_takes_it(monkeypatch, form):
    seen = {}

    def newer(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        seen.update(k=k, cu=cu_q, window_size=window_size, enable_gqa=enable_gqa)
        return q

    def older(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
        seen.update(k=k, cu=cu_q, is_causal=is_causal)
        return q

    module = sys.modules.get("torch.nn.attention.varlen") or baselines.import_module(
        "torch.nn.attention.varlen"
    )
    monkeypatch.setattr(module, "varlen_attn", newer if form == "shares heads" else older)
    inputs = plain([40, 9], Shape(4, 2, 16), CPU, torch.float32)
    peer = baselines.flash_varlen(inputs)
    assert seen["cu"].tolist() == [0, 40, 49]
    if form == "shares heads":
        assert seen["window_size"] == (-1, 0) and seen["enable_gqa"] and peer.note == ""
    else:
        assert seen["is_causal"] and seen["k"].shape[1] == 4 and peer.note == "KV heads repeated"


def test_flex_attention_is_causal_and_shares_heads(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    inputs = plain([150], Shape(4, 2, 16), CPU, torch.float32)
    assert forward_error(inputs, baselines.flex(inputs).output()) < 1e-5

    def fails(function, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(baselines.Unavailable, match="FlexAttention: RuntimeError: no compiler"):
        baselines.flex(inputs)


@pytest.fixture
def packages_at_hand(monkeypatch):
    """Packages that compute with the reference; what they were given, by function."""
    given = {}

    def function(name):
        def attend(q, k, v, **options):
            given[name] = (q.dim(), options)
            q, k, v = (x[0] if x.dim() == 4 else x for x in (q, k, v))
            causal = options.get("causal", options.get("is_causal"))
            out = attention_reference(q, k, v, Seqs.from_lengths([len(q)]), causal=causal).out
            return (out[None], None) if given[name][0] == 4 else out

        return attend

    module = type(sys)("package")
    for name in (
        "flash_attn_func",
        "flash_dense_attn_func",
        "flash_sparse_attn_func",
        "single_prefill_with_kv_cache",
    ):
        setattr(module, name, function(name))
    monkeypatch.setattr(packages, "find_spec", lambda name: name != "flash_attn_interface")
    monkeypatch.setattr(packages, "import_module", lambda name: module)
    return given


@pytest.mark.parametrize("causal", [True, False])
def test_installed_packages_are_called_and_checked(packages_at_hand, causal):
    inputs = plain([150], Shape(4, 2, 16), CPU, torch.float32, causal=causal)
    peers = packages.dense_packages(inputs)
    assert list(peers) == [packages.FLASH_ATTN, packages.FLASH_SPARSE, packages.FLASHINFER]
    for make in peers.values():
        assert forward_error(inputs, make().output()) < 1e-5
    assert packages_at_hand == {
        "flash_attn_func": (4, {"causal": causal}),
        "flash_dense_attn_func": (4, {"is_causal": causal}),
        "single_prefill_with_kv_cache": (3, {"causal": causal}),
    }


def test_a_package_that_skips_by_its_own_rule_is_not_checked(packages_at_hand):
    inputs = plain([150], Shape(4, 2, 16), CPU, torch.float32)
    (peer,) = (make() for make in packages.skipping_packages(inputs).values())
    assert peer.output is None and "not checked" in peer.note
    options = {"is_causal": True, "softmax_threshold": 1.0}
    assert packages_at_hand == {"flash_sparse_attn_func": (4, options)}


def test_packages_that_fail_are_unavailable_and_those_absent_are_left_out(monkeypatch):
    inputs = plain([150], Shape(4, 2, 16), CPU, torch.float32)
    assert packages.dense_packages(inputs) == packages.skipping_packages(inputs) == {}
    monkeypatch.setattr(packages, "find_spec", lambda name: name == "flashinfer")
    (make,) = packages.dense_packages(inputs).values()
    with pytest.raises(baselines.Unavailable, match="flashinfer: ModuleNotFoundError"):
        make()


ROOT = Path(__file__).parent.parent.parent
BUNDLED = Source(ROOT / "examples" / "tiny_lm" / "model", ROOT / "CHANGELOG.rst")


def test_what_a_model_attends_to_is_captured_layer_by_layer():
    """Attention over it is what the output projections of the model are given."""
    inputs = capture(BUNDLED, 150, SMALL)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED.model)
    ids = tokenizer(BUNDLED.text.read_text(), return_tensors="pt").input_ids[:, :150]
    attended = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: attended.append(args[0]))
    with torch.no_grad():
        model(ids)
    out = attention_reference(inputs.q, inputs.k, inputs.v, inputs.seqs).out
    assert len(inputs.lengths) == len(attended) == 8
    torch.testing.assert_close(out.flatten(1), torch.cat([x[0] for x in attended]))


def test_captured_cases_say_how_far_skipping_is_from_dense():
    options = ["--smoke", "--only", "captured", "--text", str(BUNDLED.text)]
    (case, *others) = captured_cases(BUNDLED, [300])
    rows = measure(case, SMALL, BRIEF)
    assert not any(row.failed for row in rows) and len(others) == 2
    assert 0 < rows[0].sparsity < 1
    assert "away from it" in rows[0].note
    with pytest.raises(SystemExit):
        main(options)


def test_a_text_that_is_too_short_is_said():
    with pytest.raises(ArgumentError, match="at least 1000000"):
        capture(BUNDLED, 1_000_000, SMALL)


def fake_module(monkeypatch, attention):
    module = type(sys)("kernels")
    module.attention = attention
    monkeypatch.setattr(baselines, "import_module", lambda name: module)


def test_model_optimizer_is_given_n_and_m(monkeypatch):
    seen = {}

    def attention(q, k, v, b_start_loc, b_seq_len, max_input_len, **options):
        seen.update(options, starts=b_start_loc.tolist(), most=max_input_len)
        return q

    fake_module(monkeypatch, attention)
    inputs = plain([40, 9], Shape(4, 2, 16), CPU, torch.float32)
    peer = baselines.modelopt(inputs, 2, 4)
    assert (seen["sparsity_n"], seen["sparsity_m"], seen["is_causal"]) == (2, 4, True)
    assert (seen["starts"], seen["most"], seen["softmax_scale"]) == ([0, 40], 40, 0.25)
    assert peer.output is None
    assert baselines.modelopt(inputs).output is not None


class FakeFlashInfer:
    """The wrapper of `flashinfer.mla`, in torch."""

    def __init__(self, workspace):
        assert workspace.dtype == torch.int8

    def plan(self, **options):
        assert not options["causal"]
        self.options = options

    def run(self, q, q_rotary, latents, rotary):
        ends, options = self.options["kv_indptr"].tolist(), self.options
        assert (options["head_dim_ckv"], options["head_dim_kpe"]) == (512, 64)
        assert options["num_heads"] == q.shape[1] and options["page_size"] == latents.shape[1]
        found = []
        for b, n in enumerate(options["kv_len_arr"].tolist()):
            pages = options["kv_indices"][ends[b] : ends[b + 1]].long()
            values = latents[pages].flatten(0, 1)[:n]
            keys = torch.cat([values, rotary[pages].flatten(0, 1)[:n]], -1)
            scores = torch.cat([q[b], q_rotary[b]], -1) @ keys.T * options["sm_scale"]
            found.append(scores.softmax(-1) @ values)
        return torch.stack(found)


def test_flashinfer_is_given_pages_and_lengths(monkeypatch):
    module = type(sys)("mla")
    module.BatchMLAPagedAttentionWrapper = FakeFlashInfer
    monkeypatch.setattr(baselines, "import_module", lambda name: module)
    trial = serving.latent(2, 96, 16, 32, SMALL)
    q, latents = torch.randn(2, 16, 576), torch.randn(6, 32, 576)
    table = torch.randperm(6).view(2, 3).int()
    peer = baselines.flashinfer_latent(q, latents, table, 96, 0.1)
    cache = PagedKV.from_latent(latents, 512, table)
    seqs = Seqs.from_lengths([1, 1], [96, 96])
    wanted = attention_paged(q, cache, seqs, scale=0.1, phase=Phase.DECODE).out
    torch.testing.assert_close(peer.output(), wanted)
    assert "FlashInfer" not in trial.peers


def test_flashinfer_that_is_absent_is_unavailable():
    q, latents = torch.randn(1, 16, 576), torch.randn(1, 32, 576)
    with pytest.raises(baselines.Unavailable, match="FlashInfer: ModuleNotFoundError"):
        baselines.flashinfer_latent(q, latents, torch.zeros(1, 1, dtype=torch.int32), 32, 0.1)


def test_model_optimizer_that_is_absent_or_fails_is_unavailable(monkeypatch):
    inputs = plain([9], Shape(2, 1, 16), CPU, torch.float32)

    def fails(*args, **options):
        raise ValueError("no such GPU")

    fake_module(monkeypatch, fails)
    with pytest.raises(baselines.Unavailable, match="ValueError: no such GPU"):
        baselines.modelopt(inputs)
    fake_module(monkeypatch, None)
    with pytest.raises(baselines.Unavailable, match="offers no attention here"):
        baselines.modelopt(inputs)

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(baselines, "import_module", missing)
    with pytest.raises(baselines.Unavailable, match="No module named 'modelopt"):
        baselines.modelopt(inputs)
    with pytest.raises(baselines.Unavailable, match="has no varlen_attn"):
        monkeypatch.setattr(baselines, "import_module", _raise_import_error)
        baselines.flash_varlen(inputs)


def _raise_import_error(name):
    raise ImportError(name)


@pytest.mark.parametrize(
    ("effort", "seconds", "rounds"),
    [
        (FULL, 1e-9, 100),
        (FULL, 0.03, 50),
        (FULL, 1.0, 10),
        (FULL, 4.0, 5),
        (FULL, 30.0, 3),
        (QUICK, 1e-9, 25),
        (QUICK, 30.0, 3),
        (BRIEF, 30.0, 1),
    ],
)
def test_what_takes_long_is_repeated_less_often(effort, seconds, rounds):
    assert rounds_of(effort, seconds) == rounds


def test_functions_are_called_in_turn():
    calls = []
    runs = [lambda: calls.append("a"), lambda: calls.append("b")]
    first, second = times_in_turn(runs, CPU, Effort(0.0, 3, 5))
    assert calls == ["a", "b"] * 5  # one round to warm up, one to estimate
    assert first.calls == second.calls == 3
    assert first.p20 <= first.median <= first.p80


def test_on_cuda_the_cache_is_flushed_before_each_call_and_nothing_waits_in_between(monkeypatch):
    log = []

    class FakeEvent:
        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 2.0

    monkeypatch.setattr(timing, "FLUSH_BYTES", 8)
    monkeypatch.setattr(timing, "_event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    real = torch.Tensor.zero_
    monkeypatch.setattr(torch.Tensor, "zero_", lambda x: log.append("flush") or real(x))
    runs = [lambda: log.append("a"), lambda: log.append("b")]
    assert timing._cuda_rounds(runs, CPU, 2) == [[2.0, 2.0], [2.0, 2.0]]
    one_round = [x for name in "ab" for x in ("flush", "event", name, "event")]
    head_start = ["flush"] * (timing.HEAD_START * 4)
    assert log == ["wait", *head_start, *one_round, *one_round, "wait"]


def test_times_are_quantiles():
    assert Times.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Times(3.5, 2.0, 5.0, 6)

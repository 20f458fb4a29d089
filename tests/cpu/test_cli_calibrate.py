"""The commands that calibrate, compare and export: what they print and write, and their exit codes."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import typer.main
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import modelopt_sparse as mtsa
from modelopt_sparse.calibration import prompts as prompts_file
from modelopt_sparse.module_state import sparse_modules
from modelopt_sparse_cli import app, quickstart, texts
from tests.cpu.bundled import LAYERS, MODEL, dense_model, source
from tests.cpu.test_cli import ROOT, failed, run
from tests.cpu.tiny import config_of, tiny_llama

QUICK = "--samples", 2, "--max-seqlen", 1024, "--num-decode-tokens", 2
TEXT = ROOT / "README.md"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The first layers of the bundled model, and its tokenizer."""
    folder = tmp_path_factory.mktemp("dense")
    model = dense_model()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def calibrated(dense, tmp_path_factory):
    """What the command writes, and its document."""
    out = tmp_path_factory.mktemp("calibrated") / "out"
    preset = "--preset", "skip_softmax", "--target-sparsity", 0.25
    done = run("calibrate", dense, "--output", out, *preset, *QUICK, "--json")
    assert done.exit_code == 0, done.output
    return out, json.loads(done.stdout)


def thresholds(folder):
    model = mtsa.from_pretrained(AutoModelForCausalLM, folder)
    return [module.method.config for _, module in sparse_modules(model)]


def with_errors(folder, copy, **errors):
    """A copy of a checkpoint whose formulas are off by so many points, by phase."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    for module in config["sparse_attention_config"]["metadata"]["modules"].values():
        for phase, points in errors.items():
            key = f"skip_softmax_{'decode_' * (phase == 'decode')}threshold"
            module["fields"][key]["formula"]["worst_error"] = points
    (copy / "config.json").write_text(json.dumps(config))
    return copy


# what docs/command.md says

PAGE = (ROOT / "docs/command.md").read_text(encoding="utf-8")
DOCUMENTS = {
    name: keys for name, keys in re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE, re.MULTILINE)
}
SHORT = "--length", 600, "--samples", 1


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_page_has_the_keys_of_each_document(name, calibrated, dense, tmp_path):
    preset = "--preset", "skip_softmax"
    arguments = {
        "quickstart": (dense, "--length", 200, "--windows", 1),
        "sparsify": (dense, *preset, "--output", tmp_path / "out"),
        "calibrate": (dense, *preset, "--output", tmp_path / "out", *QUICK),
        "eval": (calibrated[0], *SHORT),
        "report": (calibrated[0], *SHORT, "--output", tmp_path / "out.html"),
        "export": (with_errors(calibrated[0], tmp_path / "copy", prefill=0.0, decode=0.0),),
        "explain": (dense, *preset),
        "doctor": (),
    }
    done = run(name, *arguments[name], "--json")
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.stdout)) == re.findall(r"`(\w+)`", DOCUMENTS[name])


def test_every_command_with_a_document_is_in_the_table():
    assert {*DOCUMENTS, "bench"} == set(typer.main.get_command(app).commands)


def headings_in(text):
    lines = (line.strip() for line in text.splitlines())
    return [[x.strip() for x in line.strip("┃").split("┃")] for line in lines if line[:1] == "┃"]


@pytest.mark.parametrize("name", ["calibrate", "eval"])
def test_tables_of_the_page_are_those_of_the_command(name, calibrated, dense, tmp_path):
    section = PAGE.partition(f"\n## {name.capitalize()}\n")[2].partition("\n## ")[0]
    headings = headings_in(section)
    options = {
        "calibrate": (dense, "--preset", "skip_softmax", "--output", tmp_path / "out", *QUICK),
        "eval": (calibrated[0], *SHORT),
    }
    done = run(name, *options[name])
    assert headings and all(heading in headings_in(done.stdout) for heading in headings)


# calibrate


def test_sparsify_calibrates_with_prompts_that_the_model_takes(dense, tmp_path):
    short = shutil.copytree(dense, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1030}))
    rules = {
        "sparse_cfg": {"*": {"method": "triton_skip_softmax"}},
        "calibration": {"samples": 1, "num_decode_tokens": 2},
    }
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    given = "--config", tmp_path / "rules.json", "--output", tmp_path / "out"
    done = run("sparsify", short, *given)
    assert done.exit_code == 0, done.output
    assert thresholds(tmp_path / "out")[0].skip_softmax_threshold.table.lengths == (512, 1024, 1028)


def test_what_calibrate_writes_is_what_calibrate_in_python_does(calibrated, dense):
    out, document = calibrated
    model = AutoModelForCausalLM.from_pretrained(dense)
    mtsa.sparsify(model, mtsa.SKIP_SOFTMAX_TRITON_DEFAULT)
    aim = {"samples": 2, "max_seqlen": 1024, "num_decode_tokens": 2, "target_sparse_ratio": 0.25}
    mtsa.calibrate(model, aim)
    wanted = [module.method.config for _, module in sparse_modules(model)]
    assert thresholds(out) == wanted
    assert document["check"] == mtsa.check_calibration(model, None, aim).to_dict()
    assert document["has_tokenizer"] and (out / "tokenizer.json").is_file()


def test_it_says_what_was_fitted_and_what_is_achieved_on_other_prompts(calibrated):
    _, document = calibrated
    prefill, decode = document["thresholds"]
    assert (prefill["phase"], decode["phase"]) == ("prefill", "decode")
    assert len(prefill["modules"]) == LAYERS and prefill["lengths"] == [512, 1024]
    assert prefill["formula"]["a"] > 0 and 0 <= prefill["formula"]["worst_error"] < 100
    assert document["check"]["bounded"] is None
    for row in document["check"]["rows"]:
        assert row["length"] == 1024 and row["target"] == pytest.approx(0.25)
        assert row["achieved"] == pytest.approx(0.25, abs=0.05)


def test_a_sparse_checkpoint_is_calibrated_anew_by_options(calibrated, tmp_path):
    options = (
        "--decode-sparsity",
        0.4,
        "--thresholds-for",
        "layer",
        "--form",
        "formula",
        "--no-check",
    )
    done = run("calibrate", calibrated[0], "--output", tmp_path / "new", *options, *QUICK)
    assert done.exit_code == 0, done.output
    assert "the formula" in done.stdout and "model.layers.2.self_attn" in done.stdout
    assert "hecked" not in done.stdout and "achieved" not in done.stdout
    assert "Saved. Load with" in done.stdout
    found = thresholds(tmp_path / "new")
    decode = [config.skip_softmax_decode_threshold for config in found]
    assert len(set(decode)) == LAYERS and {(x.table, x.target_sparsity) for x in decode} == {
        (None, 0.4)
    }
    kept = [config.skip_softmax_threshold for config in thresholds(calibrated[0])]
    assert [config.skip_softmax_threshold for config in found] == kept


def test_a_files_calibration_counts_where_no_option_is_given(dense, tmp_path, monkeypatch):
    # It is calibrated once, on the text: nothing is made up.
    monkeypatch.setattr(prompts_file, "make_task", None)
    rules = {
        "sparse_cfg": {"*layers.0.*": {"method": "triton_skip_softmax"}},
        "calibration": {"target_sparse_ratio": {"prefill": 0.2}, "samples": 3, "max_seqlen": 1024},
    }
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    (tmp_path / "text.txt").write_text(TEXT.read_text())
    options = "--config", tmp_path / "rules.json", "--text", tmp_path / "text.txt"
    done = run("calibrate", dense, "--output", tmp_path / "o", *options, "--samples", 2, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    aim = document["calibration"]
    assert aim["target_sparse_ratio"] == {"prefill": 0.2} and aim["samples"] == 2
    assert aim["text_files"] == [str(tmp_path / "text.txt")]
    assert [(row["phase"], row["length"]) for row in document["check"]["rows"]] == [
        ("prefill", 1024)
    ]
    assert list(document["modules"]) == ["model.layers.0.self_attn"]


def test_heads_have_tables_and_no_formula(dense, tmp_path):
    options = "--preset", "skip_softmax", "--thresholds-for", "head", "--prefill-sparsity", 0.2
    quick = "--samples", 1, "--max-seqlen", 1024, "--no-check"
    done = run("calibrate", dense, "--output", tmp_path / "o", *options, *quick)
    assert done.exit_code == 0, done.output
    assert "a table, 512 to 1,024 keys, by head" in done.stdout
    assert failed(run("export", tmp_path / "o"), 2, "a table without a formula")


def test_help_says_the_defaults_of_the_configuration():
    """They are written out in it, for a help text imports no configuration."""
    options = typer.main.get_command(app).commands["calibrate"].params
    told = {p.name: re.search(r"; else ([\w.]*\w)", p.help or "") for p in options[1:]}
    defaults = mtsa.CalibrationConfig().model_dump()
    assert defaults["target_sparse_ratio"] == {"prefill": 0.5, "decode": 0.5}
    assert defaults["chunk_size"] is None
    assert {name: found[1] for name, found in told.items() if found} == {
        "target": "0.5",
        "chunk_size": "whole",
        **{
            name: str(defaults[name])
            for name in ("thresholds_for", "samples", "max_seqlen", "num_decode_tokens")
        },
    }


def test_a_bound_in_place_of_a_share_takes_the_place_of_that_in_the_file(dense, tmp_path):
    rules = {
        "sparse_cfg": {"*": {"method": "triton_skip_softmax"}},
        "calibration": {"target_sparse_ratio": 0.2, "samples": 1, "max_seqlen": 1024},
    }
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    options = "--config", tmp_path / "rules.json", "--num-decode-tokens", 1
    bound = "--target-dropped-mass", 0.01
    done = run("calibrate", dense, "--output", tmp_path / "o", *options, *bound, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    aim = document["calibration"]
    assert aim["target_sparse_ratio"] is None
    assert aim["target_dropped_mass"] == {"prefill": 0.01, "decode": 0.01}
    assert document["check"]["bounded"] == "mean dropped mass"
    for row in document["check"]["rows"]:
        assert row["bound"] == 0.01 and 0 < row["cost"] < 0.03
    assert "mean dropped mass: at most" in done.stderr
    # What keeps to the bound is dense: there is nothing to check.
    none = "--target-max-dropped-mass", 1e-12
    done = run("calibrate", dense, "--output", tmp_path / "none", *options, *none, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["check"] is None
    assert "Not checked: all targets are 0" in done.stderr


@pytest.mark.parametrize("name", ["sparsify", "eval", "quickstart"])
def test_other_commands_that_calibrate_show_how_far_they_are(name, dense, tmp_path):
    rules = {
        "sparse_cfg": {"*": {"method": "triton_skip_softmax"}},
        "calibration": {"samples": 2, "max_seqlen": 1024, "num_decode_tokens": 1},
    }
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    options = {
        "sparsify": ("--output", tmp_path / "o"),
        "eval": ("--length", 200, "--samples", 1),
        "quickstart": ("--length", 200, "--windows", 1),
    }[name]
    done = run(name, dense, "--config", tmp_path / "rules.json", *options, "--json")
    assert done.exit_code == 0, done.output
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("calibrating"))
    assert "2/2" in line
    if name == "sparsify":
        model = mtsa.sparsify(AutoModelForCausalLM.from_pretrained(dense), rules)
        assert thresholds(tmp_path / "o") == [
            module.method.config for _, module in sparse_modules(model)
        ]


@pytest.mark.parametrize("moment", ["calibrating", "checking"])
def test_an_interrupted_calibration_leaves_nothing(moment, dense, tmp_path, monkeypatch):
    make, seeds = prompts_file.make_task, []

    def interrupted(kind, seed):
        seeds.append(seed)
        if seed.startswith("0/1" if moment == "calibrating" else "1/1"):
            raise KeyboardInterrupt
        return make(kind, seed)

    monkeypatch.setattr(prompts_file, "make_task", interrupted)
    options = "--preset", "skip_softmax", *QUICK
    assert failed(run("calibrate", dense, "--output", tmp_path / "o", *options), 130, "Interrupted")
    assert seeds[-1] == ("0/1" if moment == "calibrating" else "1/1")
    assert list(tmp_path.iterdir()) == []


def test_what_calibrate_does_not_take(dense, tmp_path):
    arguments = "calibrate", dense, "--output", tmp_path / "o"
    preset = "--preset", "skip_softmax"
    assert failed(run(*arguments, *QUICK), 2, "which isn't sparse", "--preset or --config")
    both = "--target-sparsity", 0.5, "--prefill-sparsity", 0.5
    assert failed(run(*arguments, *preset, *both), 2, "--target-sparsity: got it and one")
    both = "--target-sparsity", 0.5, "--target-error", 0.5
    assert failed(run(*arguments, *preset, *both), 2, "one of target_sparse_ratio, target_error")
    assert failed(run(*arguments, *preset, "--max-seqlen", 8192), 2, "at most 8128")
    assert failed(run(*arguments, *preset, "--max-seqlen", 100), 2, "calibration.max_seqlen")
    assert failed(run(*arguments, *preset, "--target-sparsity", 1), 2, "target_sparse_ratio")
    assert failed(run(*arguments, "--preset", "sparse_softmax", *QUICK), 2, "methods that skip")
    assert failed(run(*arguments, *preset, "--decode-sparsity", -0.1), 2, "greater than or equal")
    # All this is said before a model is loaded.
    arguments = "calibrate", tmp_path / "nowhere", "--output", tmp_path / "o"
    for option, value in (("--target-sparsity", 1), ("--target-error", 0), ("--chunk-size", 3)):
        done = run(*arguments, *preset, option, value)
        assert failed(done, 2, "Error: calibration."), option
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("")
    mine = "--output", tmp_path / "mine"
    assert failed(run("calibrate", dense, *preset, *mine), 2, "other things than a checkpoint")
    assert not (tmp_path / "o").exists()


# eval


def test_eval_is_compare_on_windows_of_the_texts(calibrated, tmp_path):
    files = tmp_path / "a.txt", tmp_path / "b.txt"
    files[0].write_text("a b c " * 300)
    files[1].write_text(TEXT.read_text()[:9000])
    options = "--text", files[0], "--text", files[1], "--length", 600, "--samples", 2
    done = run("eval", calibrated[0], *options, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    batches = []
    for path in files:
        ids = tokenizer(path.read_text(), return_tensors="pt", verbose=False)["input_ids"]
        batches += [ids[:, :600], torch.cat([ids[:, :1], ids[:, -599:]], 1)]
    wanted = mtsa.compare(mtsa.from_pretrained(AutoModelForCausalLM, calibrated[0]), batches)
    assert document["sequences"] == 4 and document["tokens"] == 4 * 599
    assert {name: document[name] for name in wanted.to_dict()} == wanted.to_dict()


def test_eval_of_a_dense_checkpoint_on_made_up_prompts(dense):
    options = "--preset", "skip_softmax", "--length", 300, "--samples", 2
    done = run("eval", dense, *options)
    assert done.exit_code == 0, done.output
    assert "Error" not in done.output
    assert "598 tokens of 2 sequences" in done.stdout and "bits per token" in done.stdout
    assert "model.layers.2.self_attn" in done.stdout


def test_eval_of_tokens_that_are_decoded(dense, tmp_path):
    rule = {"method": "triton_skip_softmax", "skip_softmax_decode_threshold": 0.1}
    (tmp_path / "rules.json").write_text(json.dumps({"sparse_cfg": {"*": rule}}))
    options = "--config", tmp_path / "rules.json", "--length", 300, "--samples", 1
    done = run("eval", dense, *options, "--decode-tokens", 4, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["tokens"] == 3
    assert all(found["decode"]["rows"] == 4 for found in document["modules"].values())
    assert failed(run("eval", dense, *options, "--decode-tokens", 1), 2, "num_decode_tokens: got 1")


def test_what_eval_does_not_take(dense, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    preset = "--preset", "skip_softmax"
    assert failed(run("eval", dense), 2, "which isn't sparse")
    assert failed(run("eval", dense, *preset, "--length", 9000), 2, "at most 8192")
    done = run("eval", dense, *preset, "--text", tmp_path / "short.txt")
    assert failed(done, 2, "a smaller --length")
    done = run("eval", dense, *preset, "--text", tmp_path / "no.txt")
    assert failed(done, 2, "no.txt")
    tiny_llama().save_pretrained(tmp_path / "tiny")
    assert failed(run("eval", tmp_path / "tiny", *preset, "--length", 200), 2, "tokenizer")


# texts


@pytest.mark.parametrize("content", ["caf\xe9".encode("latin-1"), bytes(range(256))])
@pytest.mark.parametrize("name", ["quickstart", "eval", "calibrate", "report"])
def test_a_text_that_is_not_utf_8(name, content, dense, tmp_path):
    (tmp_path / "text.txt").write_bytes(content * 1000)
    options = "--preset", "skip_softmax", "--text", tmp_path / "text.txt"
    output = ["--output", tmp_path / "out"] * (name in ("calibrate", "report"))
    done = run(name, dense, *options, *output)
    assert failed(done, 2, "text", "text.txt', whose bytes aren't UTF-8; takes text in UTF-8")
    assert not (tmp_path / "out").exists()


def test_a_byte_order_mark_is_no_text(dense, tmp_path):
    documents = []
    for mark in ("", "\ufeff"):
        (tmp_path / "text.txt").write_text(mark + TEXT.read_text(), encoding="utf-8")
        options = "--preset", "skip_softmax", "--length", 200, "--samples", 1
        done = run("eval", dense, "--text", tmp_path / "text.txt", *options, "--json")
        documents.append(json.loads(done.stdout))
    assert documents[0] == documents[1]


class Words:
    """A tokenizer of words. It counts what it is given.

    Numbers are their own tokens; texts begin with 0, and end with what it is made with.
    """

    def __init__(self, *ending):
        self.given, self.ending = 0, ending

    def __call__(self, text, add_special_tokens=True, verbose=True):
        self.given += len(text)
        own = [int(word) if word.isdigit() else 1 for word in text.split()]
        return {"input_ids": [0, *own, *self.ending] if add_special_tokens else own}


def windows(monkeypatch, words, length, count, *ending):
    """The words of each window, and how many characters became tokens. Each has what texts begin with."""
    tokenizer = Words(*ending)
    monkeypatch.setattr(texts, "find_tokenizer", lambda name: tokenizer)
    found = texts.text_windows("any", tiny_llama(), words, length, count)
    assert all(ids.shape == (1, length) and ids[0, 0] == 0 for ids in found)
    return [ids[0, 1:].tolist() for ids in found], tokenizer.given


@pytest.mark.parametrize("count", [1, 2, 5])
def test_of_a_long_text_only_what_is_needed_becomes_tokens(count, monkeypatch):
    words = " ".join(map(str, range(100_000, 200_000)))
    found, given = windows(monkeypatch, words, 100, count)
    assert 16 * 99 * count <= given < 16 * 100 * count < len(words) / 10
    assert found == windows(monkeypatch, words, 100, count)[0]
    # The first is the text's beginning; the last is near its end.
    assert found[0] == list(range(100_000, 100_099))
    assert count == 1 or found[-1][-1] > 199_000
    # In between there is at most a word that is cut; and no window has a word of another.
    inside = [window[1:] for window in found]
    assert all(window == list(range(window[0], window[0] + 98)) for window in inside)
    assert all(early[-1] < late[0] for early, late in pairwise(inside))


def test_a_long_text_with_few_tokens_has_windows_that_do_not_overlap(monkeypatch):
    words = (" " * 100).join(map(str, range(1, 401)))
    found, given = windows(monkeypatch, words, 100, 4)
    assert found[0] == list(range(1, 100)) and found[-1] == list(range(302, 401))
    assert all(early[-1] < late[0] for early, late in pairwise(found))
    assert given > len(words)


@pytest.mark.parametrize(("tokens", "count"), [(99, 1), (197, 1), (198, 2), (296, 2), (500, 3)])
def test_a_short_text_has_fewer_windows_and_none_overlap(tokens, count, monkeypatch):
    found, _ = windows(monkeypatch, " ".join(map(str, range(tokens))), 100, 3)
    assert len(found) == count and found[0] == list(range(99))
    assert all(early[-1] < late[0] for early, late in pairwise(found))
    assert count == 1 or found[-1][-1] == tokens - 1


def test_a_text_too_short_for_a_window(monkeypatch):
    with pytest.raises(
        mtsa.SparseAttentionError, match="got a text of 99 tokens; takes at least 100"
    ):
        windows(monkeypatch, " ".join(map(str, range(98))), 100, 3)


@pytest.mark.parametrize("ending", [0, 2])
@pytest.mark.parametrize("tokens", [250, 100_000])
def test_windows_have_no_token_that_texts_end_with(tokens, ending, monkeypatch):
    words = " ".join(map(str, range(10, 10 + tokens)))
    wanted, _ = windows(monkeypatch, words, 100, 2)
    assert windows(monkeypatch, words, 100, 2, ending)[0] == wanted
    assert wanted[0] == list(range(10, 109))


@pytest.fixture
def learned_positions(tmp_path):
    """A checkpoint that has no position after 256 tokens, with a formula fitted to skip a share."""
    size = {"n_layer": 1, "n_head": 2, "n_embd": 32}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=256, **size))
    fitted = {"formula": {"a": 5.0, "b": 3.0}, "target_sparsity": 0.5}
    mtsa.sparsify(model, config_of("triton_skip_softmax", skip_softmax_threshold=fitted))
    model.save_pretrained(tmp_path / "learned")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "learned")
    return tmp_path / "learned"


@pytest.mark.parametrize("name", ["eval", "report"])
def test_windows_may_be_as_long_as_the_model_takes(name, learned_positions, tmp_path):
    options = "--text", TEXT, "--length", 256, "--samples", 2, "--json"
    output = ["--output", tmp_path / "report.html"] * (name == "report")
    done = run(name, learned_positions, *options, *output)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    found = document.get("comparison", document)
    assert (found["sequences"], found["tokens"]) == (2, 2 * 255)
    if name == "report":
        # The longest leaves room for the 64 tokens that are written after it.
        rows = [(row["length"], row["sequences"]) for row in document["check"]["rows"]]
        assert rows == [(64, 2), (128, 2), (192, 2)]


def test_windows_of_quickstart_may_be_as_long_as_the_model_takes(dense, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a b c " * 100)
    options = "--text", path, "--length", 256, "--windows", 3
    lengths = []
    with pytest.MonkeyPatch.context() as patch:
        score = quickstart.bits_per_token
        patch.setattr(
            quickstart,
            "bits_per_token",
            lambda model, row: lengths.append(row.shape[1]) or score(model, row),
        )
        done = run("quickstart", dense, *options, "--json")
    assert done.exit_code == 0, done.output
    # Dense and sparse, on the two windows that the text has.
    assert lengths == 4 * [256]
    assert json.loads(done.stdout)["windows"] == 2


# documents


@pytest.mark.parametrize("name", ["eval", "report", "quickstart"])
def test_numbers_that_are_not_finite_are_null(name, dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense)
    model.model.norm.weight.data.fill_(torch.nan)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "model")
    options = "--preset", "skip_softmax", "--text", TEXT, "--length", 200, "--json"
    output = ["--output", tmp_path / "report.html"] * (name == "report")
    done = run(name, tmp_path / "model", *options, *output)
    document = json.loads(done.stdout)
    if name == "quickstart":
        assert document["dense"] == {"bits per token": None}
        return
    assert done.exit_code == 0, done.output
    found = document.get("comparison", document)
    assert found["dense_bits"] is None and found["kl_bits"]["interval"] == [None, None]
    assert found["tokens"] == 4 * 199


# export


def test_export_prints_and_writes_what_export_in_python_does(calibrated, tmp_path):
    folder = with_errors(calibrated[0], tmp_path / "copy", prefill=3.0, decode=None)
    model = mtsa.from_pretrained(AutoModelForCausalLM, folder)
    wanted = mtsa.export_sparse_attention_config(model)
    for options in ((), ("--json",)):
        assert json.loads(run("export", folder, *options).stdout) == wanted
    path = tmp_path / "deep" / "export.json"
    done = run("export", folder, "--output", path)
    assert done.exit_code == 0 and "Written" in done.stdout, done.output
    assert json.loads(path.read_text()) == wanted
    path.write_text("mine")
    assert failed(run("export", folder, "--output", path), 2, "--force")
    assert path.read_text() == "mine"
    assert run("export", folder, "--output", path, "--force").exit_code == 0
    assert [x.name for x in path.parent.iterdir()] == ["export.json"]
    assert json.loads(path.read_text()) == wanted


def test_a_formula_that_is_off_is_said(calibrated, tmp_path):
    folder = with_errors(calibrated[0], tmp_path / "off", prefill=12.5, decode=3.0)
    done = run("export", folder)
    wanted = json.loads(done.stdout)
    (line,) = (line for line in done.stderr.splitlines() if "Warning" in line)
    assert "in prefill the formula is off by up to 12.5 points of sparsity" in line
    done = run("export", folder, "--output", tmp_path / "export.json", "--json")
    assert "Warning: in prefill" in done.stderr
    # The document is the block that engines read, as the file is, and as we read it.
    assert json.loads(done.stdout) == json.loads((tmp_path / "export.json").read_text()) == wanted
    block = json.dumps({"sparse_attention_config": json.loads(done.stdout)})
    (tmp_path / "config.json").write_text(block)
    assert mtsa.SparseAttentionConfig.from_checkpoint(tmp_path).sparse_cfg["type:LlamaAttention"]


def test_a_formula_that_is_not_used_is_not_spoken_of(calibrated, tmp_path):
    folder = with_errors(calibrated[0], tmp_path / "off", prefill=12.5, decode=None)
    model = mtsa.from_pretrained(AutoModelForCausalLM, folder)
    mtsa.set_sparsity(model, {"prefill": 0.0})
    model.save_pretrained(tmp_path / "dense prefill")
    done = run("export", tmp_path / "dense prefill", "--json")
    assert done.exit_code == 0 and "Warning" not in done.stderr


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "force"])
def test_an_interrupted_export_leaves_the_file_as_it_was(
    is_there, calibrated, tmp_path, monkeypatch
):
    path = tmp_path / "export.json"
    if is_there:
        path.write_text("old")

    def interrupted(self, text, **options):
        self.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    done = run("export", calibrated[0], "--output", path, "--force")
    assert failed(done, 130, "Interrupted")
    assert [x.name for x in tmp_path.iterdir()] == ["export.json"] * is_there
    assert not is_there or path.read_text() == "old"


def test_export_into_a_checkpoint_is_read_by_engines_and_by_us(calibrated, dense, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in calibrated[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    before = json.loads((folder / "config.json").read_text())
    done = run("export", folder, "--into")
    assert done.exit_code == 0, done.output
    after = json.loads((folder / "config.json").read_text())
    block = after.pop("sparse_attention_config")
    ours = before.pop("sparse_attention_config")
    assert after == before and {name: block[name] for name in ours} == ours
    assert block["config_groups"]["group_0"]["target_sparsity"] == {"prefill": 0.25, "decode": 0.25}
    assert thresholds(folder) == thresholds(calibrated[0])
    # What engines see of the block: they don't know the other keys.
    seen = {"sparse_attention_config": {"config_groups": block["config_groups"]}}
    (tmp_path / "config.json").write_text(json.dumps(seen))
    read = mtsa.SparseAttentionConfig.from_checkpoint(tmp_path)
    model = mtsa.sparsify(AutoModelForCausalLM.from_pretrained(dense), read)
    with torch.no_grad():
        model(source(600))
    assert sum(sum(x["prefill"]["skipped"]) for x in mtsa.get_stats(model).values()) > 0


def test_what_export_does_not_take(calibrated, dense, tmp_path):
    assert failed(run("export", dense), 2, "which isn't sparse")
    done = run("sparsify", dense, "--preset", "skip_softmax", "--output", tmp_path / "fixed")
    assert done.exit_code == 0, done.output
    assert failed(run("export", tmp_path / "fixed"), 2, "a fixed lambda, 0.1")
    assert failed(run("export", calibrated[0], "--output", tmp_path), 2, "takes a file")
    config = json.loads((calibrated[0] / "config.json").read_text())
    config["modelopt_sparse_attention_config"] = config["sparse_attention_config"]
    config["sparse_attention_config"] = {"a family's": "own"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    assert failed(run("export", tmp_path / "other", "--into"), 2, "belongs to the model itself")
    assert json.loads((tmp_path / "other/config.json").read_text()) == config

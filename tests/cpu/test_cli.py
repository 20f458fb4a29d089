"""The command line: what it prints and writes, and its exit codes."""

from __future__ import annotations

import ast
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import tomllib
from math import isnan
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import modelopt_sparse as mtsa
import modelopt_sparse_cli
from modelopt_sparse_cli import app, bench, doctor, heads, loading, options, quickstart
from modelopt_sparse_cli.heads import skipped_by_head
from modelopt_sparse_cli.interrupts import interrupted_afterwards
from tests.cpu.tiny import SKIP, logits, tiny_llama

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "examples/tiny_lm/model"
FILES = sorted(Path(modelopt_sparse_cli.__file__).parent.glob("*.py"))


def run(*arguments):
    """Runs the command in this process."""
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(argument) for argument in arguments])


def started(program, *arguments):
    """Runs a program in another process, as a user would."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def failed(done, code, *words):
    """Whether the command ended with that exit code and said so on standard error alone."""
    assert done.exit_code == code, done.output
    assert not isinstance(done.exception, Exception)
    assert done.stdout == "" and "Traceback" not in done.stderr
    said = " ".join(done.stderr.replace("│", " ").split())
    assert all(word in said for word in words), said
    return True


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny model on disk, without a tokenizer."""
    tiny_llama().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


HELP = """
import sys
from modelopt_sparse_cli import main
try:
    main()
except SystemExit as end:
    heavy = {"torch", "transformers", "triton", "modelopt_sparse"} & set(sys.modules)
    print("imported:", sorted(heavy), "exit:", end.code)
"""


@pytest.mark.parametrize(
    "command",
    ["", "quickstart", "sparsify", "calibrate", "eval", "report", "export", "explain", "doctor"],
)
def test_help_imports_nothing_heavy(command):
    done = started(HELP, *filter(None, [command]), "--help")
    assert "Usage: modelopt-sparse" in done.stdout, done.stderr
    assert "imported: [] exit: 0" in done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_file_imports_anything_heavy_outside_of_a_function(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [] if node.level else [node.module]
            roots = {name.partition(".")[0] for name in names}
            assert not roots & {"torch", "transformers", "modelopt_sparse", "numpy"}


def test_help_says_what_exit_codes_mean():
    said = " ".join(run("--help").stdout.split())
    assert "0 done; 1 the check found a problem; 2 wrong usage" in said
    assert "70 an unexpected error" in said and "130 interrupted" in said


def test_the_version_is_told_at_once():
    done = started(HELP, "--version")
    assert done.stdout == f"modelopt-sparse {mtsa.__version__}\nimported: [] exit: 0\n", done.stderr
    assert "--version" in run("--help").stdout


def test_the_version_of_a_clone_that_is_not_installed(monkeypatch):
    def missing(name):
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", missing)
    assert run("--version").stdout == f"modelopt-sparse {mtsa.__version__}\n"


def test_python_m_is_the_command():
    command = [sys.executable, "-m", "modelopt_sparse", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Usage: modelopt-sparse" in done.stdout, done.stderr


def test_the_command_that_is_installed_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["modelopt-sparse"].partition(":")
    assert getattr(importlib.import_module(module), name) is modelopt_sparse_cli.main
    assert any(line.startswith("typer") for line in project["dependencies"])


def test_presets_are_those_of_the_package():
    assert [preset.value for preset in options.Preset] == list(mtsa.PRESETS)


# sparsify


@pytest.mark.parametrize("source", ["--preset", "--config"])
def test_what_sparsify_writes_computes_what_sparsify_in_python_does(source, checkpoint, tmp_path):
    config, given = mtsa.PRESETS["skip_softmax"], "skip_softmax"
    if source == "--config":
        config, given = mtsa.SparseAttentionConfig.load(SKIP), tmp_path / "rules.yaml"
        config.save(given)
    out = tmp_path / "deep" / "out"
    done = run("sparsify", checkpoint, source, given, "--output", out, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["config"] == config.to_dict() and not document["has_tokenizer"]
    assert document["modules"]["model.layers.0.self_attn"]["enable"] is True
    expected = mtsa.sparsify(tiny_llama(), config)
    found = mtsa.from_pretrained(AutoModelForCausalLM, out)
    assert torch.equal(logits(found), logits(expected))
    assert not torch.equal(logits(found), logits(tiny_llama()))
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_the_summary_and_the_tokenizer(tmp_path):
    done = run("sparsify", BUNDLED, "--preset", "sparse_softmax", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "triton_sparse_softmax" in done.stdout and "Saved" in done.stdout
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_a_checkpoint_is_replaced_with_force_alone(checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is as good as none
    arguments = "sparsify", checkpoint, "--preset", "skip_softmax", "--output", out
    assert run(*arguments).exit_code == 0
    (out / "mine.txt").write_text("")
    assert failed(run(*arguments), 2, "holds a checkpoint", "--force")
    assert (out / "mine.txt").exists()
    assert run(*arguments, "--force").exit_code == 0
    assert not (out / "mine.txt").exists() and (out / "config.json").exists()


def test_what_is_not_a_checkpoint_is_never_replaced(checkpoint, tmp_path):
    arguments = "sparsify", checkpoint, "--preset", "skip_softmax", "--force", "--output"
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("")
    assert failed(run(*arguments, home), 2, "other things than a checkpoint")
    assert failed(run(*arguments, home / "thesis.tex"), 2, "takes a folder")
    assert (home / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (OSError("disk full"), 2), (mtsa.StateError("no"), 2)],
    ids=["interrupted", "disk full", "an error of ours"],
)
@pytest.mark.parametrize("is_there", [False, True], ids=["new", "force"])
def test_nothing_is_left_of_a_save_that_fails(
    error, code, is_there, checkpoint, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    if is_there:
        out.mkdir()
        (out / "config.json").write_text("old")
    before = sorted(tmp_path.iterdir())

    def save(model, folder):
        (Path(folder) / "config.json").write_text("half")
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    arguments = "sparsify", checkpoint, "--preset", "skip_softmax", "--output", out, "--force"
    assert failed(run(*arguments), code, "Interrupted" if code == 130 else str(error))
    assert sorted(tmp_path.iterdir()) == before
    assert not is_there or (out / "config.json").read_text() == "old"


KILLED = """
import os, sys
from pathlib import Path
from transformers import PreTrainedModel
from modelopt_sparse_cli import main

number = int(sys.argv.pop())

def save(model, folder):
    (Path(folder) / "config.json").write_text("half")
    os.kill(os.getpid(), number)

PreTrainedModel.save_pretrained = save
main()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_killed_leaves_no_output(number, checkpoint, tmp_path):
    out = tmp_path / "out"
    done = started(
        KILLED, "sparsify", checkpoint, "--preset", "skip_softmax", "--output", out, int(number)
    )
    assert done.returncode == (130 if number == signal.SIGINT else -number), done.stderr
    assert not out.exists() and "Traceback" not in done.stderr
    if number == signal.SIGINT:
        assert os.listdir(tmp_path) == ["dense"]


INTERRUPTED = """
import os, signal, sys

class Interrupting:
    # Ctrl-C while what `sys.argv` names last is imported.

    name = sys.argv.pop()

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
            print("sent", file=sys.stderr)

sys.meta_path.insert(0, Interrupting())
from modelopt_sparse_cli import main
main()
"""


@pytest.mark.parametrize("library", ["numpy.linalg", "torch._C"])
def test_an_interrupt_while_libraries_are_imported(library, checkpoint):
    done = started(INTERRUPTED, "explain", checkpoint, "--preset", "skip_softmax", library)
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr.splitlines()[-2:] == ["sent", "Interrupted."]
    assert "Traceback" not in done.stderr


def test_doctor_is_interrupted_alike():
    done = started(INTERRUPTED, "doctor", "numpy.linalg")
    assert done.returncode == 130 and "Traceback" not in done.stderr


BEGINNING = """
import typer.main, modelopt_sparse_cli

def interrupted(app):
    raise KeyboardInterrupt

typer.main.get_command = interrupted
modelopt_sparse_cli.main()
"""


def test_an_interrupt_before_there_is_a_command():
    done = started(BEGINNING, "--help")
    assert (done.returncode, done.stderr) == (130, "Interrupted.\n")


UNEXPECTED = """
from modelopt_sparse_cli import doctor, main

def broken():
    raise RuntimeError("of nobody's")

doctor.required_packages = broken
main()
"""


def test_an_error_that_nobody_expects_has_a_traceback_and_an_exit_code_of_its_own():
    done = started(UNEXPECTED, "doctor")
    assert done.returncode == 70 and done.stdout == ""
    assert "Traceback" in done.stderr and "RuntimeError: of nobody's" in done.stderr


def test_interrupts_are_as_before_after_they_were_held_back():
    before = signal.getsignal(signal.SIGINT)
    ran = []
    with pytest.raises(KeyboardInterrupt), interrupted_afterwards():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        ran.append(True)
    assert ran and signal.getsignal(signal.SIGINT) is before
    with pytest.raises(OSError, match="of the block"), interrupted_afterwards():
        signal.raise_signal(signal.SIGINT)
        raise OSError("of the block")
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupts_that_are_ignored_stay_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupted_afterwards():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_libraries_are_imported_as_they_are():
    found = []
    thread = threading.Thread(target=lambda: found.append(run("bench", "--list").exit_code))
    thread.start()
    thread.join()
    assert found == [0]


# errors


def test_a_model_that_is_not_there(tmp_path):
    for command in ("explain", "sparsify"):
        output = ["--output", tmp_path / "out"] * (command == "sparsify")
        done = run(command, tmp_path / "nowhere", "--preset", "skip_softmax", *output)
        assert failed(done, 2, "Error: MODEL: got", "nowhere")


# Every command that takes a model, with all that it needs to load it.
LOADING = {
    "quickstart": (),
    "sparsify": ("--preset", "skip_softmax", "--output"),
    "calibrate": ("--preset", "skip_softmax", "--output"),
    "eval": ("--preset", "skip_softmax"),
    "report": ("--preset", "skip_softmax", "--output"),
    "explain": ("--preset", "skip_softmax"),
    "export": (),
}


def loading_of(name, folder, tmp_path, options=None):
    """Runs a command of `LOADING` with a model."""
    options = LOADING[name] if options is None else options
    return run(name, folder, *options, *[tmp_path / "out"] * ("--output" in options))


@pytest.mark.parametrize(
    "keys",
    [
        ["_attn_implementation"],
        ["attn_implementation"],
        ["attn_implementation", "_attn_implementation"],
    ],
    ids="+".join,
)
@pytest.mark.parametrize("name", LOADING)
def test_a_checkpoint_does_not_choose_the_implementation(name, keys, checkpoint, tmp_path):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | dict.fromkeys(keys, "someone/kernel")))
    done = loading_of(name, checkpoint, tmp_path)
    assert failed(done, 2, "attn_implementation; takes a file that leaves implementations")
    assert sorted(tmp_path.iterdir()) == [checkpoint]


@pytest.mark.parametrize("name", ["calibrate", "eval", "report", "export"])
def test_a_sparse_checkpoint_does_not_either(name, tmp_path):
    mtsa.sparsify(tiny_llama(), SKIP).save_pretrained(tmp_path / "sparse")
    path = tmp_path / "sparse/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"_attn_implementation": "someone/kernel"}))
    options = [option for option in LOADING[name] if option == "--output"]
    done = loading_of(name, tmp_path / "sparse", tmp_path, options)
    assert failed(done, 2, "attn_implementation; takes a file that leaves implementations")


@pytest.mark.parametrize("depth", [100_000, 900], ids=["by the file", "by transformers"])
@pytest.mark.parametrize("name", LOADING)
def test_a_configuration_that_is_nested_too_deeply(name, depth, checkpoint, tmp_path):
    path = checkpoint / "config.json"
    opened = path.read_text().rstrip().removesuffix("}")
    path.write_text(f'{opened}, "x": {"[" * depth}{"]" * depth}}}')
    done = loading_of(name, checkpoint, tmp_path)
    assert failed(done, 2, "Error: ", str(checkpoint)) and done.stderr.count("\n") == 1


def test_a_configuration_with_other_things_than_numbers(checkpoint):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 0}))
    done = run("explain", checkpoint, "--preset", "skip_softmax")
    assert failed(done, 2, "Error: MODEL: got") and done.stderr.count("\n") == 1


def test_a_folder_that_is_no_checkpoint_and_a_configuration_without_weights(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    done = run("explain", tmp_path / "empty", "--preset", "skip_softmax")
    assert failed(done, 2, "Error: MODEL: got", "Not there", "config.json")
    done = run("explain", checkpoint / "config.json", "--preset", "skip_softmax", "--json")
    assert json.loads(done.stdout)["modules"]


def test_one_of_preset_and_config(checkpoint, tmp_path):
    (tmp_path / "rules.json").write_text("{}")
    both = "--preset", "skip_softmax", "--config", tmp_path / "rules.json"
    sparsify = "sparsify", checkpoint, "--output", tmp_path / "out"
    assert failed(run(*sparsify), 2, "got neither")
    assert failed(run("explain", checkpoint), 2, "which isn't sparse", "--preset or --config")
    assert failed(run("explain", checkpoint, *both), 2, "got both")
    assert failed(run("explain", checkpoint, "--preset", "no_such"), 2, "no_such", "skip_softmax")
    assert failed(run("explain", checkpoint, "--config", tmp_path / "no.json"), 2, "no.json")


def test_a_configuration_that_is_wrong_is_told_in_its_own_words(checkpoint, tmp_path):
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({"sparse_cfg": {"*nothing*": {"method": "triton_skip_softmax"}}}))
    done = run("sparsify", checkpoint, "--config", path, "--output", tmp_path / "out", "--json")
    assert failed(done, 2, "no attention module of this model")
    path.write_text(json.dumps({"sparse_cfg": {"*": {"method": "triton_skip_softmaks"}}}))
    assert failed(run("explain", checkpoint, "--config", path), 2, "triton_skip_softmaks")
    assert not (tmp_path / "out").exists()


def test_what_others_print_does_not_spoil_the_document(checkpoint, monkeypatch):
    load = loading.load_model_config

    def chatty(name):
        print("hello")
        return load(name)

    monkeypatch.setattr("modelopt_sparse_cli.explain.load_model_config", chatty)
    done = run("explain", checkpoint, "--preset", "skip_softmax", "--json")
    assert json.loads(done.stdout)["modules"] and "hello" in done.stderr


# quickstart


def test_quickstart_compares_the_bundled_model(monkeypatch):
    arguments = "quickstart", "--length", 300, "--windows", 1
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    for words in ("triton_skip_softmax", "Tiles skipped", "bits per token", "to the bit"):
        assert words in done.stdout
    document = json.loads(run(*arguments, "--json").stdout)
    assert document["restored"] and document["dense"] != document["sparse"]
    # A model that has learnt something of such text, in bits of a byte.
    assert 0 < document["dense"]["bits per token"] < 4
    assert len(document["modules"]) == 8


def test_quickstart_without_a_model_or_its_tokenizer(checkpoint, monkeypatch):
    assert failed(run("quickstart", checkpoint, "--length", 99), 2, "without a tokenizer")
    assert failed(run("quickstart", "--length", 10**6), 2, "--length: got 1000000; takes at most")
    monkeypatch.setattr(quickstart, "BUNDLED", checkpoint / "nowhere")
    assert failed(run("quickstart"), 2, "MODEL: got none")


def test_quickstart_wants_enough_text(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    done = run("quickstart", "--text", tmp_path / "short.txt", "--length", 300)
    assert failed(done, 2, "a smaller --length")


def test_layers_of_other_head_counts_have_blanks():
    counts = {"skipped": [1, 0], "visible": [4, 4]}, {"skipped": [2], "visible": [4]}
    shares = skipped_by_head({f"{n}": {"prefill": each} for n, each in enumerate(counts)})
    assert shares[0].tolist() == [0.25, 0] and shares[1, 0] == 0.5 and isnan(shares[1, 1])
    table = heads.table_of(shares)
    assert [list(column.cells) for column in table.columns] == [["0", "1"], ["25", "50"], ["0", ""]]


# doctor


def test_doctor_finds_this_machine_well_and_says_what_it_has():
    done = run("doctor", "--json")
    document = json.loads(done.stdout)
    versions = {row["name"]: row["version"] for row in document["required"]}
    assert {"python", "torch", "triton", "transformers", "pydantic", "fnmatch2"} <= set(versions)
    assert done.exit_code == 0 and document["ok"]
    assert len(document["devices"]["gpus"]) == torch.cuda.device_count()
    assert {row["name"] for row in document["optional"]} >= {"matplotlib", "flash_attn"}
    table = run("doctor").stdout
    assert "'modelopt_sparse[bench]'" in table or "matplotlib" in table


@pytest.mark.parametrize(
    ("line", "problem"),
    [("torch>=99", "out of range: pip install 'torch>=99'"), ("no-such-thing", "missing")],
)
def test_doctor_fails_where_something_required_is_not_there(line, problem, monkeypatch):
    lines = [line, "other>=1; extra == 'test'", "triton>=3; sys_platform == 'nowhere'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    done = run("doctor", "--json")
    rows = json.loads(done.stdout)["required"]
    assert done.exit_code == 1 and [row["name"] for row in rows[1:]] == [line.split(">")[0]]
    assert rows[0]["problem"] is None and problem in rows[1]["problem"]
    assert problem in run("doctor").stdout


def test_doctor_of_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGE", "no_such_package")
    assert "not installed" in doctor.required_packages()[0]["problem"]


# bench


def test_bench_gets_its_arguments_and_gives_its_exit_code(monkeypatch):
    seen = []
    monkeypatch.setattr("modelopt_sparse.bench.__main__.main", lambda argv: seen.append(argv) or 1)
    arguments = ["--only", "skip", "--json", "rows.json", "--help", "-x"]
    assert run("bench", *arguments).exit_code == 1 and seen == [arguments]


def test_bench_lists_its_cases_and_refuses_as_itself():
    done = run("bench", "--list")
    assert done.exit_code == 0 and "dense: dense-4k" in done.stdout
    assert failed(run("bench", "--no-such-option"), 2, "--no-such-option")
    assert bench.SETTINGS["add_help_option"] is False

"""The examples run as they are, as a user would start them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import modelopt_sparse as mtsa
from tests.thinned import thinned

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples/tiny_lm/model"


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_quickstart_shows_sparsity_quality_and_a_picture(tmp_path):
    done = run(
        ROOT / "examples/quickstart.py",
        "--length",
        1024,
        "--windows",
        1,
        "--needles",
        1,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "triton_skip_softmax",
        "Tiles skipped",
        "bits per byte",
        "needles found",
        "to the bit",
    ):
        assert words in done.stdout
    assert (tmp_path / "out/quickstart.png").read_bytes().startswith(b"\x89PNG")


def test_the_quickstart_refuses_an_unknown_preset(tmp_path):
    done = run(ROOT / "examples/quickstart.py", "--preset", "no_such", cwd=tmp_path)
    assert done.returncode == 2 and "no_such" in done.stderr


@thinned(3, preset=["skip_softmax", "sparse_softmax", "flash_skip_softmax"])
def test_a_checkpoint_is_compared_and_exported(preset, tmp_path):
    done = run(
        *(ROOT / "examples/hf_sa.py", "--pyt_ckpt_path", MODEL, "--sparse_attn", preset),
        *("--seq_len", 512, "--new_tokens", 4, "--export_dir", tmp_path / "out"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "bits per token" in done.stdout and "generated" in done.stdout
    assert "sparse_attention_config" in json.loads((tmp_path / "out/config.json").read_text())
    assert mtsa.is_attn_sparsified(mtsa.from_pretrained(AutoModelForCausalLM, tmp_path / "out"))


def test_a_backend_that_the_preset_does_not_have_is_refused(tmp_path):
    done = run(
        *(
            ROOT / "examples/hf_sa.py",
            "--pyt_ckpt_path",
            MODEL,
            "--sparse_attn",
            "flash_skip_softmax",
        ),
        *("--backend", "triton"),
        cwd=tmp_path,
    )
    assert done.returncode == 2 and "takes pytorch" in done.stderr


def test_the_method_of_the_example_is_in_the_summary(tmp_path):
    done = run(ROOT / "examples/write_a_method.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "skip_by_bits" in done.stdout and "bits=3.0" in done.stdout


def test_the_harness_scores_the_dense_model_and_the_sparse_one(tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install -e '.[lm_eval]'")
    done = run(
        *(ROOT / "examples/lm_eval_harness.py", "--samples", 2, "--threshold", 1.0), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    scores = dict(re.findall(r"^(dense|sparse) +(acc .*)$", done.stdout, re.MULTILINE))
    assert scores["dense"].startswith("acc 1.0000 +- 0.0000, perplexity 1.0")
    assert scores["sparse"].count("+-") == 2 and scores["sparse"] != scores["dense"]
    lines = (tmp_path / "out/lm_eval/frequent_words.jsonl").read_text().splitlines()
    prompts = [json.loads(line) for line in lines]
    assert [len(row["prompt"]) + len(row["answer"]) for row in prompts] == [1023] * 2


def test_the_harness_refuses_an_unknown_task(tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install -e '.[lm_eval]'")
    done = run(ROOT / "examples/lm_eval_harness.py", "--task", "no_such", cwd=tmp_path)
    assert done.returncode == 2 and "no_such" in done.stderr

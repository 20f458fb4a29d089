"""The fine-tuning example at tiny settings: what it computes, not how well it trains."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--steps", 2, "--length", 512, "--batch", 1, "--windows", 2, "--device", "cpu")


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "examples/finetune.py", *TINY, *arguments]
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[str, dict]:
    folder = tmp_path_factory.mktemp("finetune")
    process = run("--target-sparsity", 0.15, "--json", "results.json", cwd=folder)
    assert process.returncode == 0, process.stderr
    return process.stdout, json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_three_models_are_scored_at_equal_sparsity(done):
    printed, results = done
    for words in ("as shipped", "trained sparse", "trained dense", "Skipped in training"):
        assert words in printed
    shares = [results[name]["sparsity"] for name in ("before", "trained_sparse", "trained_dense")]
    assert max(shares) - min(shares) < 0.01
    assert all(abs(share - 0.15) <= 0.005 for share in shares)
    for name in ("before", "trained_sparse", "trained_dense"):
        assert results[name]["dense"] != results[name]["sparse"]


def test_the_gap_after_training_is_to_the_model_that_was_trained_dense(done):
    _, results = done
    before = fmean(results["before"]["sparse"]) - fmean(results["before"]["dense"])
    after = fmean(results["trained_sparse"]["sparse"]) - fmean(results["trained_dense"]["dense"])
    assert math.isclose(results["gap_before"], before, abs_tol=1e-12)
    assert math.isclose(results["gap_after"], after, abs_tol=1e-12)
    assert math.isclose(results["closer"], before - after, abs_tol=1e-12)


def test_both_runs_train_and_only_one_of_them_skips(done):
    _, results = done
    sparse, dense = (results["curves"][name] for name in ("trained_sparse", "trained_dense"))
    assert 0 < sparse[-1]["sparsity"] < 1
    assert "sparsity" not in dense[-1]
    weights_changed = [results[name]["dense"] for name in ("trained_sparse", "trained_dense")]
    assert results["before"]["dense"] not in weights_changed
    assert weights_changed[0] != weights_changed[1]


def test_a_share_that_no_threshold_skips_is_refused(tmp_path):
    refused = run("--target-sparsity", 0.9, cwd=tmp_path)
    assert refused.returncode == 2
    assert "Longer sequences" in " ".join(refused.stderr.replace("│", " ").split())

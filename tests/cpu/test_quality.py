"""What leaving tiles out costs the bundled model: measured in small, and the figures of the documentation."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import modelopt_sparse as mtsa
from examples.quality import __main__ as command
from examples.quality import measure, plots, tables
from examples.quality.cells import TEXT, Cell, added, load, save
from examples.quality.measure import measured
from examples.quality.variants import GROUPS, Variant
from examples.tiny_lm import tasks
from examples.tiny_lm.evaluate import text_windows
from modelopt_sparse.module_state import sparse_modules

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/quality.md"
RESULTS = ROOT / "docs/quality/h200.json"
CELL = Cell(
    "presets", "a", "needle", 64, 10, dense=9, sparse=8, lost=2, gained=1, visible=8, skipped=2
)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(command.MODEL, dtype=torch.float32).eval()


def of_group(group: str, *names: str) -> list[Variant]:
    return [variant for variant in GROUPS[group] if variant.name in names]


def test_chance_costs_more_than_the_oracle_and_the_model_is_dense_again(model):
    text = Path(command.__file__).read_bytes()
    variants = of_group("selectors", "skip-softmax", "oracle", "random")
    found = measured(model, "selectors", variants, TEXT, 700, 1, 0, text)
    bits = {cell.variant: cell for cell in found}
    worse = {name: cell.more_bits for name, cell in bits.items()}
    assert worse["random"] > 10 * max(abs(worse["skip-softmax"]), abs(worse["oracle"])), worse
    assert 0 < bits["skip-softmax"].sparsity < 1 and bits["oracle"].sparsity is None
    assert not mtsa.is_attn_sparsified(model) and not list(sparse_modules(model))


def test_answers_are_counted_in_pairs(model, monkeypatch):
    answers = iter([[True, True, True, False], [True, False, False, True]])
    monkeypatch.setattr(
        measure, "_answered", lambda model, samples, logits_of: np.array(next(answers))
    )
    text = Path(command.__file__).read_bytes()
    variants = of_group("selectors", "skip-softmax")
    (cell,) = measured(model, "selectors", variants, "needle", 300, 4, 0, text)
    assert (cell.dense, cell.sparse, cell.lost, cell.gained) == (3, 2, 2, 1)


@pytest.mark.parametrize("logits_of", [measure.at_once, measure.decoded])
def test_dense_answers_of_the_bundled_model_are_right(model, logits_of):
    """The last byte of the answer counts, in a batch as alone."""
    rng = random.Random(0)
    samples = [
        tasks.sample("needle", 300, rng, Path(command.__file__).read_bytes()) for _ in range(3)
    ]
    wrong = samples[1].tokens.copy()
    wrong[samples[1].answers[-1][1] - 1] ^= 1
    samples[1] = replace(samples[1], tokens=wrong)
    assert measure._answered(model, samples, logits_of).tolist() == [True, False, True]


def test_every_setting_is_in_force_and_another_one(model):
    text = Path(command.__file__).read_bytes()
    found = list(measured(model, "settings", GROUPS["settings"], TEXT, 520, 1, 0, text))
    assert len({(cell.sparse_bits, cell.skipped) for cell in found}) == len(found)


def test_what_is_decoded_skips_in_decode_alone(model):
    text = Path(command.__file__).read_bytes()
    variants = of_group("decode", "tiles of 16")
    (cell,) = measured(model, "decode", variants, TEXT, 400, 1, 0, text)
    assert 0 < cell.skipped < cell.visible and cell.more_bits != 0
    # 8 layers, 6 heads, 64 steps that see 336 to 399 keys, in tiles of 16.
    assert cell.visible == 8 * 6 * sum(-(-keys // 16) for keys in range(336, 400))
    windows = text_windows(text, 1, 400)
    whole = measure.at_once(model, windows[:, :-1], 64)
    torch.testing.assert_close(
        measure.decoded(model, windows[:, :-1], 64), whole, atol=1e-3, rtol=0
    )


def test_cells_of_one_place_add_up():
    (both,) = added([CELL, replace(CELL, sparse=9, lost=1, gained=1)])
    assert (both.samples, both.dense, both.sparse, both.lost, both.gained) == (20, 18, 17, 3, 2)
    assert both.sparsity == 0.25 and both.drop == pytest.approx(0.05)
    low, high = both.drop_interval
    assert low < 0.05 < high
    assert both.sparse_interval[0] < 17 / 20 < both.sparse_interval[1]
    with pytest.raises(ValueError, match="needle"):
        CELL + replace(CELL, task=TEXT)


def test_a_file_gives_its_cells_back(tmp_path):
    text = Cell("presets", "a", TEXT, 64, 2, dense_bits=(1.0, 2.0), sparse_bits=(1.5, 2.5))
    save(tmp_path / "cells.json", {"device": "a GPU"}, [CELL, text])
    assert load(tmp_path / "cells.json") == ({"device": "a GPU"}, [CELL, text])
    assert text.more_bits == 0.5 and text.more_bits_interval == (0.5, 0.5)


def test_the_command_measures_adds_up_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "GROUPS", {"selectors": of_group("selectors", "skip-softmax")})
    files = [tmp_path / f"{seed}.json" for seed in range(2)]
    for seed, file in enumerate(files):
        arguments = ["--group", "selectors", "--task", TEXT, "--length", "400", "--samples", "2"]
        done = CliRunner().invoke(
            app(command.main), [*arguments, f"--seed={seed}", f"--json={file}"]
        )
        assert done.exit_code == 0, done.output
        assert "bits per byte" in done.output
    both = tmp_path / "both.json"
    done = CliRunner().invoke(app(tables.main), [*map(str, files), f"--json={both}"])
    assert done.exit_code == 0, done.output
    (cell,) = load(both)[1]
    assert cell.samples == 4 and len(set(cell.dense_bits)) == 4
    picture = tmp_path / "cost.png"
    done = CliRunner().invoke(app(plots.main), [str(both), str(picture), "--length=400"])
    assert done.exit_code == 0 and picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_refuses_what_it_does_not_know():
    arguments = ["--group", "presets", "--task", "riddles", "--length", "400"]
    done = CliRunner().invoke(app(command.main), arguments)
    assert done.exit_code == 2 and "riddles" in done.output and "needle" in done.output


def test_figures_of_the_page_are_those_of_the_committed_files():
    text = PAGE.read_text()
    for page in (PAGE, ROOT / "README.md"):
        assert tables.refreshed(page) == page.read_text()
    for results in (ROOT / "docs/quality").glob("*.json"):
        shown = {
            name
            for file, names in tables.BLOCKS.shown(text)
            if file == f"quality/{results.name}"
            for name in names
        }
        assert shown - {tables.TASK_TABLE} == {cell.group for cell in load(results)[1]}


def test_what_is_said_of_the_default_holds_in_the_committed_file():
    """At 4k half of the tiles and more, within 0.003 bits per byte, and no task a point worse."""
    own = [c for c in load(RESULTS)[1] if c.variant == "skip_softmax" and c.length == 4096]
    (text,) = (cell for cell in own if cell.task == TEXT)
    others = [cell for cell in own if cell.task != TEXT]
    assert text.sparsity >= 0.5 and text.more_bits_interval[1] <= 0.003
    assert len(others) == 7 and all(cell.samples == 500 and cell.drop <= 0.01 for cell in others)


def app(main):
    """A typer command."""
    import typer

    found = typer.Typer()
    found.command()(main)
    return found

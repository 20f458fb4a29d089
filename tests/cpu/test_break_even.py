"""From which sparsity on skipping is faster than the fastest dense kernel, and what is printed of it."""

from __future__ import annotations

import csv
import io
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from modelopt_sparse.bench import __main__ as bench_main
from modelopt_sparse.bench import report, tables
from modelopt_sparse.bench.baselines import COPY, PRODUCT
from modelopt_sparse.bench.break_even import Advice, advice, break_evens
from modelopt_sparse.bench.case import OWN_DENSE
from modelopt_sparse.bench.plots import roofline_shares, save_plots
from modelopt_sparse.bench.run import Row, fastest_rivals
from modelopt_sparse.bench.timing import Times


def row(peer, milliseconds, ours=1.0, case="skip", is_rival=True, **more):
    times = [Times(x, 0.9 * x, 1.1 * x, 5) for x in (ours, milliseconds)]
    more = {"sparsity": 0.5, "length": 4096, **more}
    return Row(
        "skip", case, peer, milliseconds / ours, *times, error=0.001, is_rival=is_rival, **more
    )


def rows_of(share, tile_cost, sparsity=0.5, **more):
    """A case whose dense kernel takes 2 ms, the fastest rival `share` of it, and a slower one."""
    ours = 2.0 * (1 - sparsity + tile_cost * sparsity)
    more = {"ours": ours, "sparsity": sparsity, **more}
    return [
        row("slow", 2.5, **more),
        row("fast", 2.0 * share, **more),
        row(OWN_DENSE, 2.0, is_rival=False, **more),
        row(PRODUCT, 0.1, is_rival=False, **more),
    ]


@pytest.mark.parametrize("sparsity", [0.4, 0.75, 1.0])
def test_what_a_skipped_tile_costs_gives_the_break_even(sparsity):
    (found,) = break_evens(rows_of(0.85, 0.5, sparsity))
    assert (found.rival, found.length) == ("fast", 4096)
    assert found.dense_share == pytest.approx(0.85)
    assert found.tile_cost == pytest.approx(0.5)
    assert found.sparsity == pytest.approx(0.3)


def test_at_the_break_even_both_take_as_long():
    (found,) = break_evens(rows_of(0.8, 0.4))
    ours = 2.0 * (1 - found.sparsity + 0.4 * found.sparsity)
    assert ours == pytest.approx(2.0 * 0.8)


def test_a_dense_kernel_that_is_the_fastest_always_pays_and_a_dear_tile_never():
    assert break_evens(rows_of(1.1, 0.5))[0].sparsity == 0
    assert break_evens(rows_of(0.9, 1.0))[0].sparsity > 1


@pytest.mark.parametrize(
    "rows",
    [
        rows_of(0.85, 0.5, 0.2),
        [each for each in rows_of(0.85, 0.5) if each.peer != OWN_DENSE],
        [each for each in rows_of(0.85, 0.5) if not each.is_rival],
        [Row("skip", "skip", "fast", note="n/a: not installed")],
    ],
    ids=["few tiles", "no own dense", "no rival", "no timing"],
)
def test_cases_that_say_nothing_are_left_out(rows):
    assert break_evens(rows) == []


def test_advice_begins_where_half_of_the_tiles_are_enough_for_good():
    rows = []
    for length, share in ((1024, 0.9), (2048, 0.7), (4096, 0.8), (8192, 0.85)):
        rows += rows_of(share, 0.5, case=f"skip-{length}", length=length)
    assert advice(break_evens(rows)) == Advice(4096, pytest.approx(0.4))
    assert advice(break_evens(rows[4:8])) == Advice(None, None)
    assert advice(break_evens(rows_of(0.8, 0.5, length=None))) == Advice(None, None)


def test_the_best_case_of_a_length_counts():
    rows = rows_of(0.6, 0.5, case="a") + rows_of(0.9, 0.5, 0.75, case="b")
    assert advice(break_evens(rows)) == Advice(4096, pytest.approx(0.2))


def printed(table):
    text = io.StringIO()
    Console(file=text, width=150).print(table)
    return text.getvalue()


def test_what_is_printed():
    found = break_evens(rows_of(0.85, 0.5) + rows_of(0.9, 1.0, case="dear"))
    text = printed(report.break_even_table(found))
    assert "30%" in text and "none" in text and "0.85" in text
    assert "from 4096 tokens on" in report.said_of(Advice(4096, 0.3)) and "30%" in report.said_of(
        Advice(4096, 0.3)
    )
    assert "At no length" in report.said_of(Advice(None, None))


def test_the_fastest_rival_of_a_case_is_marked():
    lines = printed(report.table_of("skip", rows_of(0.85, 0.5))).splitlines()
    assert [line.split()[1:3] for line in lines if " * " in line] == [["fast", "*"]]


def test_rows_as_csv(tmp_path):
    failed = Row("skip", "other", "", note="FAILED: why, so", failed=True)
    report.save_csv(tmp_path / "rows.csv", [row("fast", 3.0), failed])
    first, second = csv.DictReader((tmp_path / "rows.csv").open(newline=""))
    assert (first["peer"], first["ratio"], first["theirs_median"]) == ("fast", "3.0", "3.0")
    assert float(first["ours_p80"]) == pytest.approx(1.1)
    assert (second["note"], second["ours_median"], second["failed"]) == (
        "FAILED: why, so",
        "",
        "True",
    )


def test_plots_are_drawn_of_what_there_is(tmp_path):
    skipping = rows_of(0.85, 0.5)
    bound = [row(PRODUCT, 0.7, case="dense", is_rival=False, sparsity=None)]
    bound.append(row(COPY, 0.4, case="dense", is_rival=False, sparsity=None))
    assert save_plots(tmp_path / "none", []) == []
    assert [p.name for p in save_plots(tmp_path / "a", skipping)] == ["speedup.png"]
    paths = save_plots(tmp_path / "b" / "c", skipping + bound)
    assert [p.name for p in paths] == ["speedup.png", "roofline.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)


def test_the_bound_that_binds_counts_and_the_fastest_rival():
    bound = [row(PRODUCT, 0.7, case="a"), row(COPY, 0.4, case="a"), row(COPY, 0.2, case="b")]
    bound.append(row(COPY, 0.9, case="c"))
    bound = [replace(each, is_rival=False, sparsity=None) for each in bound[:3]] + bound[3:]
    assert roofline_shares(bound) == {"a": 0.7, "b": 0.2}
    assert {case: each.peer for case, each in fastest_rivals(rows_of(0.85, 0.5)).items()} == {
        "skip": "fast"
    }


def test_plots_without_matplotlib_are_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(bench_main, "find_spec", lambda name: None)
    assert bench_main.main(["--smoke", "--plots", "folder"]) == 2
    assert "modelopt-sparse[bench]" in capsys.readouterr().err


def test_saved_rows_become_tables(tmp_path, capsys):
    path = tmp_path / "rows.json"
    missing = Row("dense", "dense", "absent", note="n/a: a | b", error=0.002)
    saved = [*rows_of(0.85, 0.5)[:2], missing]
    report.save(path, {"device": "a GPU", "clocks": None}, saved)
    assert report.load(path) == ({"device": "a GPU", "clocks": None}, saved)
    assert tables.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("device a GPU\n\n| skip | beside |")
    assert "| skip | fast | 1.13 | 50.0% | 0.0010 |" in text
    assert "| dense | absent | n/a: a / b |  | 0.0020 |" in text


@pytest.mark.parametrize("content", [None, "{", "[]", '{"rows": [{}]}', '{"rows": [{"ours": 1}]}'])
def test_files_without_rows_are_refused(tmp_path, capsys, content):
    path = tmp_path / "rows.json"
    if content is not None:
        path.write_text(content)
    assert tables.main([str(path)]) == 2
    assert "rows.json" in capsys.readouterr().err


def test_tables_want_one_file(capsys):
    with pytest.raises(SystemExit, match="2"):
        tables.main([])
    assert "usage" in capsys.readouterr().err


def test_blocks_of_a_document_are_written_from_their_file(tmp_path):
    report.save(tmp_path / "rows.json", {"device": "a GPU"}, rows_of(0.85, 0.5))
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- bench: rows.json skip -->\nold\n<!-- /bench -->\nafter\n")
    for _ in range(2):  # the second time there is nothing to change
        assert tables.main(["--into", str(document)]) == 0
        lines = document.read_text().splitlines()
        assert lines[:3] == ["before", "<!-- bench: rows.json skip -->", ""]
        assert lines[-2:] == ["<!-- /bench -->", "after"]
        assert (
            "| skip | fast 1.13, slow 1.67 | dense 1.33 | product 0.07 | 50.0% | 0.0010 |" in lines
        )
        assert "old" not in lines


def test_a_block_of_a_group_that_was_not_measured_is_refused(tmp_path, capsys):
    report.save(tmp_path / "rows.json", {}, rows_of(0.85, 0.5))
    document = tmp_path / "page.md"
    text = "<!-- bench: rows.json skip decode -->\n<!-- /bench -->\n"
    document.write_text(text)
    assert tables.main(["--into", str(document)]) == 2
    assert "decode" in capsys.readouterr().err and document.read_text() == text


BROKEN = {
    "none": "no block\n",
    "no end": "<!-- bench: rows.json skip -->\nkept\n<!-- bench: rows.json skip -->\n<!-- /bench -->\n",
    "no group": "<!-- bench: rows.json -->\n<!-- /bench -->\n",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_documents_without_whole_blocks_stay_as_they_are(text, tmp_path, capsys):
    report.save(tmp_path / "rows.json", {}, rows_of(0.85, 0.5))
    document = tmp_path / "page.md"
    document.write_text(text)
    assert tables.main(["--into", str(document)]) == 2
    assert "blocks: got" in capsys.readouterr().err and document.read_text() == text


def test_a_summary_says_what_failed_and_what_was_not_checked():
    rows = rows_of(0.85, 0.5)
    rival = next(row for row in rows if row.is_rival)
    noted = [replace(row, note="not checked") if row is rival else row for row in rows]
    failed = Row("skip", "wrong", "", note="FAILED: error 1.0", error=1.0, failed=True)
    text = tables.summary_of({}, [*noted, failed])
    assert f"{rival.peer} {rival.ratio:.2f} (not checked)" in text
    assert "| wrong | FAILED: error 1.0 |  |  |  | 1.0000 |" in text


def test_a_summary_shows_every_row_that_was_timed():
    packed = Row("pages", "pages64", "own packed", ratio=0.99)
    bound = Row("pages", "pages64", COPY, ratio=0.5)
    text = tables.summary_of({}, [packed, bound])
    assert "| pages64 |  | packed 0.99 | copy 0.50 |  |  |" in text


def test_figures_of_the_readme_are_those_of_the_committed_file():
    readme = Path(__file__).parents[2] / "README.md"
    assert tables.BLOCKS.shown(readme.read_text())
    assert tables.refreshed(readme) == readme.read_text()


def test_the_environment_names_commit_and_clocks(monkeypatch):
    def run(command, **options):
        is_smi = command[:2] == ["nvidia-smi", "--id=GPU-12-34"]
        said = "1980 MHz, 3201 MHz, 700 W\n" if is_smi else "abc-dirty\n"
        return subprocess.CompletedProcess(command, 0, said)

    monkeypatch.setattr(report.subprocess, "run", run)
    where = report.environment(torch.device("cpu"))
    assert (where["commit"], where["clocks"]) == ("abc-dirty", None)
    gpu = SimpleNamespace(uuid="12-34")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert report.environment(torch.device("cuda"))["clocks"] == "1980 MHz, 3201 MHz, 700 W"

    def missing(command, **options):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(report.subprocess, "run", missing)
    assert report.environment(torch.device("cpu"))["commit"] == ""

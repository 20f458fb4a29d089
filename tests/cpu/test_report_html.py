"""The report: one well-formed page that asks for no other file, with everything escaped."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from transformers import AutoTokenizer

import modelopt_sparse as mtsa
from modelopt_sparse.bench.report import save
from modelopt_sparse.bench.run import Row
from modelopt_sparse.report_html import html_report
from modelopt_sparse.report_html.curves import lambda_at
from modelopt_sparse.report_html.elements import el, table
from modelopt_sparse.report_html.heat_map import heat_map
from tests.cpu.bundled import LAYERS, MODEL, dense_model, methods, source
from tests.cpu.test_cli import failed, run
from tests.cpu.tiny import FLASH, NM, prompt, tiny_llama

VOID = {"meta"}
NAME = """<script>alert("1")</script> & 'more'"""
HEADS = 6


class Page(HTMLParser):
    """Checks that elements nest, and keeps them: their attributes, and texts by tag."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)

    def said(self, tag):
        return [text for name, text in self.texts if name == tag]


def checked(text):
    """The page, which needs nothing else."""
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe", "object"}
    for _, attributes in page.elements:
        assert not {"src", "href", "srcset"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?:", "".join(page.said("style")))
    return page


def measured():
    """A calibrated model, and what the report is made of: its comparisons and check."""
    model = mtsa.sparsify(dense_model(), mtsa.SKIP_SOFTMAX_TRITON_DEFAULT)
    data = [source(1024), source(700, 40_000)]
    mtsa.calibrate(model, {"target_sparse_ratio": 0.25, "num_decode_tokens": 2}, data)
    found = mtsa.compare(model, data)
    decoded = mtsa.compare(model, data, num_decode_tokens=3)
    check = mtsa.check_calibration(model, data, {"num_decode_tokens": 2})
    return model, found, decoded, check


@pytest.fixture(scope="module")
def parts():
    return measured()


def test_every_head_has_its_shade_and_its_number(parts):
    model, found, decoded, check = parts
    page = checked(html_report(model, NAME, found, decoded=decoded, check=check))
    # Tiles and errors, in two phases.
    assert page.count("rect") == 4 * LAYERS * HEADS
    shades = {attributes["fill-opacity"] for tag, attributes in page.elements if tag == "rect"}
    assert {"0", "1"} <= {f"{float(shade):g}" for shade in shades} and len(shades) > 10
    title = page.said("title")
    in_decode = decoded.modules["model.layers.1.self_attn"].decode
    assert f"model.layers.1.self_attn, head 2: {in_decode.sparsity.heads[2]:.2%}" in title
    assert f"model.layers.1.self_attn, head 2: {in_decode.relative_error.heads[2]:.2%}" in title
    error = found.modules["model.layers.2.self_attn"].prefill.relative_error.heads[5]
    assert f"model.layers.2.self_attn, head 5: {error:.2%}" in title


def test_rows_are_layers_where_names_number_them_and_nothing_is_said_of_no_scale():
    values = {f"model.layers.{layer}.self_attn": [0.0, 0.5] for layer in (2, 7)}
    page = checked("<!DOCTYPE html>" + _text(heat_map("shares", values, "of tiles", 0.5)))
    assert page.said("text") == ["head", "layer", "0", "1", "2", "7"]
    assert "50.0% of tiles" in page.said("span")
    values = {"encoder.0.attn": [0.0, 0.0], "decoder.0.attn": [0.0]}
    page = checked("<!DOCTYPE html>" + _text(heat_map("shares", values, "of tiles", 0.0)))
    assert page.said("text") == ["head", "module", "0", "1", "0", "1"]
    assert page.said("p") == ["0 % everywhere"] and page.said("span") == []


def test_curves_and_tables_say_what_was_measured(parts):
    model, found, decoded, check = parts
    page = checked(html_report(model, NAME, found, decoded=decoded, check=check))
    own = methods(model)[0]
    tables = own.skip_softmax_threshold.table, own.skip_softmax_decode_threshold.table
    measured = [{*each.lengths, 700, 1024} for each in tables]
    assert page.count("polyline") == sum(map(len, measured))
    assert page.count("circle") == 2 * len(check.rows) == 8
    row = check.rows[0]
    assert f"700 keys: target 25.0%, achieved {row.achieved:.1%}" in page.said("title")
    assert f"{found.dense_bits:.4f}" in page.said("td")
    assert json.loads(page.said("pre")[0])["model.layers.0.self_attn"]["enable"] is True
    headings = [text for text in page.said("h2")]
    assert headings == ["Quality", "By layer and head", "Calibration", "Configuration"]


def test_a_curve_is_the_lambda_that_runs(parts):
    threshold = methods(parts[0])[0].skip_softmax_threshold
    table = threshold.table
    for index, length in enumerate(table.lengths):
        for target, factor in zip(table.targets, table.factors[index], strict=True):
            wanted = min(factor / length, 1)
            assert lambda_at(threshold, target, length) == pytest.approx(wanted, rel=1e-6)
    formula = threshold.model_copy(update={"table": None})
    wanted = threshold.formula.factor(0.3) / 5000
    assert lambda_at(formula, 0.3, 5000) == pytest.approx(wanted)


def test_whatever_is_said_is_escaped(parts):
    model, found, _, _ = parts
    row = Row("skip", NAME, NAME, ratio=1.5, note=NAME)
    page = checked(html_report(model, NAME, found, bench=({"device": NAME}, [row])))
    assert page.said("h1") == [f"Sparse attention: {NAME}"]
    assert page.said("td")[-1] == NAME and "1.50" in page.said("td")
    assert "Speed" in page.said("h2")
    plain = checked("<!DOCTYPE html>" + _text(el("p", NAME, aria_label=NAME, class_=NAME)))
    assert plain.elements == [("p", {"aria-label": NAME, "class": NAME})]
    rows = checked("<!DOCTYPE html>" + _text(table(["a", NAME], [(NAME, "2")])))
    assert rows.said("th") == ["a", NAME, NAME]


def _text(element):
    from xml.etree.ElementTree import tostring

    return tostring(element, encoding="unicode", method="html")


@pytest.mark.parametrize("config", [FLASH, NM], ids=["skips", "counts no tiles"])
def test_a_model_that_is_not_calibrated_has_a_page_too(config):
    model = mtsa.sparsify(tiny_llama(), config)
    found = mtsa.compare(model, [prompt()])
    page = checked(html_report(model, "tiny", found))
    assert page.said("h3") == []
    assert "Calibration" not in page.said("h2")
    assert page.count("svg") == (
        1 if config is NM else 2
    )  # errors, and the tiles that were counted
    assert ("no tiles were counted" in page.said("p")[0]) == (config is NM)


# The command


@pytest.fixture
def checkpoint(parts, tmp_path):
    parts[0].save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command_writes_the_page(checkpoint, tmp_path):
    row = Row("skip", "skip50-16k", "cuDNN", ratio=1.25, is_rival=True)
    save(tmp_path / "rows.json", {"device": "a GPU"}, [row])
    out = tmp_path / "deep" / "report.html"
    options = "--length", 1200, "--samples", 1, "--bench", tmp_path / "rows.json", "--json"
    done = run("report", checkpoint, "--output", out, *options)
    assert done.exit_code == 0, done.output
    page = checked(out.read_text())
    assert page.count("rect") == 4 * LAYERS * HEADS and "skip50-16k" in page.said("th")
    document = json.loads(done.stdout)
    assert [(row["phase"], row["length"]) for row in document["check"]["rows"]] == [
        (phase, length) for phase in ("prefill", "decode") for length in (600, 1200)
    ]
    assert document["comparison"]["tokens"] == 1199 and document["decoded"]["tokens"] == 15
    assert "Of tokens that are decoded" in page.said("h3")
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    out.write_text("mine")
    assert failed(run("report", checkpoint, "--output", out), 2, "--force")
    assert out.read_text() == "mine"


def test_windows_shorter_than_what_was_calibrated_have_no_check(checkpoint, tmp_path):
    short = "--length", 200, "--samples", 1
    done = run("report", checkpoint, "--output", tmp_path / "report.html", *short, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["check"] is None


def test_the_command_refuses_what_are_no_times_before_it_loads_anything(checkpoint, tmp_path):
    (tmp_path / "rows.json").write_text("[]")
    options = "--output", tmp_path / "r.html", "--bench", tmp_path / "rows.json"
    assert failed(run("report", checkpoint, *options), 2, "--bench: got", "bench --json")
    assert not (tmp_path / "r.html").exists()

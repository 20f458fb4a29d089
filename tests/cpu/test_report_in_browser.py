"""The report as a browser shows it: wide and narrow, light and dark."""

from __future__ import annotations

import io
import re
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from modelopt_sparse.bench.run import Row
from modelopt_sparse.report_html import html_report
from tests.cpu.test_report_html import measured

api = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright: pip install -e '.[test]'"
)

BROWSERS = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
)
HOW = "needs Chromium: apt-get install chromium-headless-shell, or playwright install chromium"
WIDTHS, SCHEMES = (1280, 400), ("light", "dark")
# What text needs to be read, and a line to be seen, by the W3C's guidelines (WCAG 2.2, 1.4.3 and 1.4.11).
TEXT_CONTRAST, LINE_CONTRAST = 4.5, 3.0

# Each element with text of its own, or that matches, with its box and the colours that are computed for it.
LOOK = """selector => {
  const background = e => {
    const own = getComputedStyle(e).backgroundColor;
    return own !== "rgba(0, 0, 0, 0)" || !e.parentElement ? own : background(e.parentElement);
  };
  const says = e => [...e.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.data.trim());
  return [...document.body.querySelectorAll(selector)]
    .filter(e => selector !== "*" || (says(e) && e.tagName !== "title"))
    .map(e => {
      const box = e.getBoundingClientRect(), style = getComputedStyle(e);
      const owner = e.ownerSVGElement;
      return {
        text: e.textContent.trim().slice(0, 60),
        box: [box.left, box.top, box.right, box.bottom],
        colour: e.tagName === "text" ? style.fill : style.color,
        stroke: style.stroke,
        background: background(e),
        visible: e.checkVisibility({opacityProperty: true, visibilityProperty: true}),
        scrolls: e.closest(".wide, pre") !== null,
        picture: owner ? [...document.querySelectorAll("svg")].indexOf(owner) : null,
      };
    });
}"""


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium
        path = next(filter(None, map(shutil.which, BROWSERS)), chromium.executable_path)
        if not Path(path).exists():
            pytest.skip(HOW)
        browser = chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(browser, tmp_path_factory):
    model, found, decoded, check = measured()
    note = "by its own rule, its result was not checked"
    rows = [Row("skip", "skip-hot-rows-16k", "flash-sparse-attn", 0.98, note=note)] * 3
    name = "a-folder-without-spaces/" * 5
    bench = {"device": "a GPU", "commit": "0123456789abcdef" * 5}, rows
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html_report(model, name, found, decoded=decoded, check=check, bench=bench))
    return path


@pytest.fixture(params=[(w, s) for w in WIDTHS for s in SCHEMES], ids=lambda p: f"{p[0]}-{p[1]}")
def page(request, browser, report):
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.heard = []
    page.on("console", lambda message: page.heard.append(message.text))
    page.on("pageerror", lambda error: page.heard.append(str(error)))
    page.on("request", lambda asked: page.heard.append(asked.url))
    page.goto(report.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    yield page
    page.close()


def luminance(colour: str) -> float:
    """Relative luminance of an opaque CSS colour, as WCAG defines it."""
    red, green, blue = map(int, re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour).groups())
    linear = [
        x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
        for x in (red / 255, green / 255, blue / 255)
    ]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_it_asks_for_nothing_and_complains_of_nothing(page, report):
    page.wait_for_load_state("networkidle")
    assert page.heard == [report.as_uri()]


def test_everything_is_there_to_be_seen(page):
    for selector, least in {
        "h1, h2, h3, figcaption, .legend, pre": (50, 12),
        "table": (200, 60),
        ".maps svg": (150, 100),
        ".curves svg": (300, 150),
        "rect": (10, 10),
        "polyline": (100, 10),
        "circle": (3, 3),
        ".scale": (60, 8),
        ".line": (15, 3),
        ".ring, .disc": (8, 8),
    }.items():
        seen = page.evaluate(LOOK, selector)
        assert seen, selector
        for element in seen:
            left, top, right, bottom = element["box"]
            assert element["visible"], (selector, element)
            assert right - left >= least[0] and bottom - top >= least[1], (selector, element)


def test_the_page_does_not_scroll_sideways(page):
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for element in page.evaluate(LOOK, ".wide, pre, p, h1, h2, h3, figcaption"):
        left, _, right, _ = element["box"]
        assert left >= 0 and right <= width, element
    for element in page.evaluate(LOOK, "*"):
        assert element["scrolls"] or element["box"][2] <= width, element


def test_labels_of_pictures_are_whole_and_apart(page):
    pictures = page.evaluate(LOOK, "svg")
    labels = page.evaluate(LOOK, "svg text")
    assert len(labels) > 40
    for label in labels:
        left, top, right, bottom = pictures[label["picture"]]["box"]
        box = label["box"]
        inside = box[0] >= left - 1 and box[1] >= top - 1 and box[2] <= right + 1
        assert inside and box[3] <= bottom + 1, label
    for one, other in combinations(labels, 2):
        (left, top, right, bottom), box = one["box"], other["box"]
        apart = right <= box[0] or box[2] <= left or bottom <= box[1] or box[3] <= top
        assert apart or one["picture"] != other["picture"], (one, other)


def test_text_and_lines_stand_out_in_both_schemes(page):
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    texts = page.evaluate(LOOK, "*")
    assert len(texts) > 100
    for text in texts:
        assert (luminance(text["background"]) < 0.1) == dark, text
        assert contrast(text["colour"], text["background"]) >= TEXT_CONTRAST, text
    for line in page.evaluate(LOOK, "polyline, circle"):
        assert contrast(line["stroke"], line["background"]) >= LINE_CONTRAST, line


def test_a_cell_that_skips_most_stands_out_and_one_that_skips_nothing_does_not(page):
    image = pytest.importorskip("PIL.Image", reason="needs pillow: pip install -e '.[test]'")
    width, bottom = page.viewport_size["width"], page.evaluate(LOOK, ".maps")[0]["box"][3]
    page.set_viewport_size({"width": width, "height": round(bottom) + 1})
    pixels = np.asarray(image.open(io.BytesIO(page.screenshot())).convert("RGB"))
    assert pixels.shape[1] == width
    colours = {
        float(cell.get_attribute("fill-opacity")): pixels[round(y), round(x)]
        for cell in page.query_selector_all("rect")
        for box in [cell.bounding_box()]
        for x, y in [(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)]
    }
    painted = {share: "rgb({}, {}, {})".format(*colour) for share, colour in colours.items()}
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert painted[0] == background
    assert contrast(painted[1], background) >= TEXT_CONTRAST
    ordered = [contrast(painted[share], background) for share in sorted(painted)]
    assert len(ordered) > 10 and ordered == sorted(ordered)

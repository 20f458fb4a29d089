"""Lambda by the share of tiles that it skips, for some lengths; and what was achieved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from xml.etree.ElementTree import Element

import torch

from modelopt_sparse.calibration.check_results import CheckRow
from modelopt_sparse.calibration.fit import TARGETS
from modelopt_sparse.methods.calibrated import CalibratedThreshold

from .elements import el

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 332, 56, 32, 36, 56
# All of them stand out from white and from nearly black.
COLOURS = ("#2b7bd1", "#d95f02", "#1b9e77", "#8a72d0", "#e7298a", "#5f9a1c", "#a6761d", "#808080")
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def lambda_at(threshold: CalibratedThreshold, target: float, length: int) -> float:
    """Lambda for a share of tiles above 0 and a number of keys; of heads the geometric mean."""
    factor = threshold.at(target).scale_factor
    assert factor is not None
    return float(factor.thresholds(torch.tensor([length])).log().mean().exp())


def curves(
    title: str,
    threshold: CalibratedThreshold,
    lengths: Sequence[int],
    rows: Sequence[CheckRow],
    note: str = "",
) -> Element:
    """A line for each length. Rings are targets, discs what was achieved with their lambda.

    Args:
        rows: of the same phase.
        note: what else to say below.
    """
    lines = {n: [lambda_at(threshold, target, n) for target in TARGETS] for n in lengths}
    least = min(x for line in lines.values() for x in line)
    bottom = min(math.floor(math.log10(least)), -1)  # of the axis, a power of ten

    def place(share: float, threshold: float) -> tuple[float, float]:
        down = math.log10(threshold) / bottom
        return LEFT + share * (WIDTH - LEFT - RIGHT), TOP + down * (HEIGHT - TOP - BOTTOM)

    parts, points, legend = _axes(bottom, place), [], []
    for index, (length, line) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(
            "{:.1f},{:.1f}".format(*place(*at)) for at in zip(TARGETS, line, strict=True)
        )
        parts.append(el("polyline", points=path, fill="none", stroke=colour, stroke_width=2))
        swatch = el("span", class_="line", style=f"border-color: {colour}")
        legend.append(el("span", swatch, f"{length:,} keys"))
        for row in rows:
            if row.length != length:
                continue
            used = lambda_at(threshold, row.target, length)
            said = f"{length:,} keys: target {row.target:.1%}, achieved {row.achieved:.1%}"
            for share, is_target in ((row.target, True), (row.achieved, False)):
                x, y = place(share, used)
                # A disc within its ring leaves both to be seen.
                look = {"r": 6, "class_": "target"} if is_target else {"r": 3.5, "fill": colour}
                ring = {"cx": x, "cy": y, "stroke": colour, "stroke_width": 2, **look}
                points.append(el("circle", el("title", said), **ring))
    if points:
        legend.append(el("span", el("span", class_="ring"), "target"))
        legend.append(el("span", el("span", class_="disc"), "achieved, over all modules"))
    if any(line[-1] == 1 for line in lines.values()):
        note = f"Where a line lies at lambda 1, not even that skips so much. {note}".rstrip()
    svg = el(
        "svg", *parts, *points, viewBox=f"0 0 {WIDTH} {HEIGHT}", width=WIDTH, height=HEIGHT,
        role="img", aria_label=title,
    )  # fmt: skip
    return el(
        "figure",
        el("figcaption", title),
        el("div", svg, class_="wide"),
        el("p", *legend, class_="legend"),
        *([el("p", note, class_="note")] if note else []),
        class_="curves",
    )


def _axes(bottom: int, place: Callable[[float, float], tuple[float, float]]) -> list[Element]:
    parts = []
    for decade in range(0, bottom - 1, -1):
        (left, y), (right, _) = place(0.0, 10.0**decade), place(1.0, 10.0**decade)
        parts.append(el("line", x1=left, y1=y, x2=right, y2=y, class_="grid"))
        power = "10" + str(decade).translate(SUPERSCRIPTS) if decade else "1"
        parts.append(el("text", power, x=left - 8, y=y + 4, text_anchor="end"))
    for percent in range(0, 101, 20):
        x, y = place(percent / 100, 10.0**bottom)
        parts.append(el("text", f"{percent} %", x=x, y=y + 26, text_anchor="middle"))
    x, y = place(0.5, 10.0**bottom)
    parts.append(el("text", "share of visible tiles skipped", x=x, y=y + 50, text_anchor="middle"))
    parts.append(el("text", "lambda", x=0, y=16))
    return parts

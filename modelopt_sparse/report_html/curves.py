"""Lambda by the share of tiles that it skips, for some lengths; and what was achieved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from xml.etree.ElementTree import Element

import torch

from modelopt_sparse.calibration.check_results import CheckRow
from modelopt_sparse.calibration.fit import TARGETS
from modelopt_sparse.kernels.scale_factors import ScaleFactors
from modelopt_sparse.methods.calibrated import CalibratedThreshold

from .elements import el

WIDTH, HEIGHT, LEFT, TOP = 560, 280, 62, 14
COLOURS = ("#08306b", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#666666")


def lambda_at(threshold: CalibratedThreshold, target: float, length: int) -> float:
    """Lambda for a share of tiles above 0 and a number of keys; of heads the geometric mean."""
    factor = threshold.at(target).scale_factor
    assert factor is not None
    if isinstance(factor, ScaleFactors):
        return float(factor.thresholds(torch.tensor([length])).log().mean().exp())
    return min(factor / length, 1.0)


def curves(
    title: str, threshold: CalibratedThreshold, lengths: Sequence[int], rows: Sequence[CheckRow]
) -> Element:
    """A line for each length. Rings are targets, discs what was achieved with their lambda.

    Args:
        rows: of the same phase.
    """
    lines = {n: [lambda_at(threshold, target, n) for target in TARGETS] for n in lengths}
    least = min(x for line in lines.values() for x in line)
    bottom = min(math.floor(math.log10(least)), -1)  # of the axis, a power of ten

    def place(share: float, threshold: float) -> tuple[float, float]:
        down = math.log10(threshold) / bottom
        return LEFT + share * (WIDTH - LEFT - 10), TOP + down * (HEIGHT - TOP - 40)

    parts = _axes(bottom, place)
    for index, (length, line) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        points = " ".join(
            "{:.1f},{:.1f}".format(*place(*at)) for at in zip(TARGETS, line, strict=True)
        )
        parts.append(el("polyline", points=points, fill="none", stroke=colour, stroke_width=1.6))
        y = HEIGHT - 48 - 14 * index  # where no line comes
        parts.append(el("text", f"{length:,} keys", x=WIDTH - 90, y=y, fill=colour))
        for row in rows:
            if row.length != length:
                continue
            used = lambda_at(threshold, row.target, length)
            said = f"{length:,} keys: target {row.target:.1%}, achieved {row.achieved:.1%}"
            for share, fill in ((row.target, "#ffffff"), (row.achieved, colour)):
                x, y_at = place(share, used)
                ring = {"cx": x, "cy": y_at, "r": 4.5, "fill": fill, "stroke": colour}
                parts.append(el("circle", el("title", said), **ring))
    svg = el(
        "svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", width=WIDTH, height=HEIGHT, role="img",
        aria_label=title,
    )  # fmt: skip
    return el("figure", el("div", svg, class_="wide"), el("figcaption", title))


def _axes(bottom: int, place: Callable[[float, float], tuple[float, float]]) -> list[Element]:
    parts = []
    for decade in range(0, bottom - 1, -1):
        (left, y), (right, _) = place(0.0, 10.0**decade), place(1.0, 10.0**decade)
        parts.append(el("line", x1=left, y1=y, x2=right, y2=y, stroke="#dddddd"))
        parts.append(
            el("text", f"1e{decade}" if decade else "1", x=left - 6, y=y + 4, text_anchor="end")
        )
    for percent in range(0, 101, 20):
        x, y = place(percent / 100, 10.0**bottom)
        parts.append(el("text", f"{percent} %", x=x, y=y + 18, text_anchor="middle"))
    x, y = place(0.5, 10.0**bottom)
    parts.append(el("text", "tiles skipped", x=x, y=y + 34, text_anchor="middle"))
    parts.append(el("text", "lambda", x=4, y=TOP + 4))
    return parts

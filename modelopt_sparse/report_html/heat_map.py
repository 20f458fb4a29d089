"""Layers by heads, as shades."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.etree.ElementTree import Element

from .elements import el

CELL, LEFT, TOP = 22, 46, 22


def heat_map(title: str, values: Mapping[str, Sequence[float]]) -> Element:
    """Shares of each module's heads, with a table's worth of text: each cell says its own.

    Args:
        values: by module, one for each head.
    """
    largest = max((value for row in values.values() for value in row), default=0.0)
    columns = max(map(len, values.values()), default=0)
    width, height = LEFT + CELL * columns + 2, TOP + CELL * len(values) + 2
    parts = [
        _label(LEFT + CELL * (head + 0.5), TOP - 7, str(head), "middle") for head in range(columns)
    ]
    for layer, (name, row) in enumerate(values.items()):
        parts.append(_label(LEFT - 6, TOP + CELL * (layer + 0.68), str(layer), "end"))
        parts += [
            el(
                "rect",
                el("title", f"{name}, head {head}: {value:.2%}"),
                x=LEFT + CELL * head,
                y=TOP + CELL * layer,
                width=CELL - 1,
                height=CELL - 1,
                fill=_shade(value / largest if largest else 0.0),
                stroke="#dddddd",
            )
            for head, value in enumerate(row)
        ]
    svg = el(
        "svg", *parts, viewBox=f"0 0 {width} {height}", width=width, height=height, role="img",
        aria_label=title,
    )  # fmt: skip
    said = f"{title}. Layers down, heads across; white 0 %, darkest {largest:.2%}."
    return el("figure", el("div", svg, class_="wide"), el("figcaption", said))


def _label(x: float, y: float, text: str, anchor: str) -> Element:
    return el("text", text, x=x, y=y, text_anchor=anchor)


def _shade(part: float) -> str:
    """From white to dark blue."""
    ends = zip((255, 255, 255), (8, 48, 107), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in ends)

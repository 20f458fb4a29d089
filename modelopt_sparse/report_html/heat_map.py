"""Layers by heads, as shades."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.etree.ElementTree import Element

from .elements import el

LEFT, TOP, WIDTH = 48, 40, 832


def heat_map(
    title: str, values: Mapping[str, Sequence[float]], unit: str, largest: float
) -> Element:
    """Shares of each module's heads; each cell says its own where the pointer rests on it.

    Args:
        values: by module, one for each head; 0 to `largest`.
        unit: what they are shares of.
        largest: what the darkest shade stands for (in a dark page, the lightest).
    """
    columns = max(map(len, values.values()))
    cell = min(max(WIDTH // columns, 12), 24)  # in pixels; wider ones than the page scroll
    rows_are, rows = _rows(list(values))
    width, height = LEFT + cell * columns + 2, TOP + cell * len(values) + 2
    parts = [
        _label(LEFT + cell * columns / 2, 12, "head", "middle"),
        _label(-TOP - cell * len(rows) / 2, 12, rows_are, "middle", transform="rotate(-90)"),
    ]
    step = 1 if cell >= 18 else 4  # so that numbers don't touch
    parts += [
        _label(LEFT + cell * (head + 0.5), TOP - 7, str(head), "middle")
        for head in range(0, columns, step)
    ]
    for layer, ((name, row), label) in enumerate(zip(values.items(), rows, strict=True)):
        parts.append(_label(LEFT - 7, TOP + cell * (layer + 0.5) + 4, label, "end"))
        parts += [
            el(
                "rect",
                el("title", f"{name}, head {head}: {value:.2%}"),
                x=LEFT + cell * head,
                y=TOP + cell * layer,
                width=cell - 2,
                height=cell - 2,
                class_="cell",
                fill_opacity=round(value / largest, 4) if largest else 0,
            )
            for head, value in enumerate(row)
        ]
    svg = el(
        "svg", *parts, viewBox=f"0 0 {width} {height}", width=width, height=height, role="img",
        aria_label=title,
    )  # fmt: skip
    scale = [el("span", class_="scale"), el("span", f"{largest:.1%} {unit}")]
    legend = [el("span", "0 %"), *scale] if largest else ["0 % everywhere"]
    return el(
        "figure",
        el("figcaption", title),
        el("div", svg, class_="wide"),
        el("p", *legend, class_="legend"),
    )


def _rows(names: Sequence[str]) -> tuple[str, list[str]]:
    """What rows are, and the label of each: the layer's number where names have one of their own."""
    layers = [next((part for part in name.split(".") if part.isdigit()), "") for name in names]
    if "" not in layers and len(set(layers)) == len(names):
        return "layer", layers
    return "module", [str(index) for index in range(len(names))]


def _label(x: float, y: float, text: str, anchor: str, **attributes: object) -> Element:
    return el("text", text, x=x, y=y, text_anchor=anchor, **attributes)

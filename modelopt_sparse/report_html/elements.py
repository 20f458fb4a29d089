"""Elements of HTML and SVG. They are trees until the end, so all text is escaped when it is written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from xml.etree.ElementTree import Element, tostring

Child = Element | str


def el(tag: str, *children: Child, **attributes: object) -> Element:
    """An element. Names of attributes are written with "-" for "_", and without one at the end."""
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    found = Element(tag, {names[name]: _said(value) for name, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            found.append(child)
        elif len(found):
            found[-1].tail = (found[-1].tail or "") + child
        else:
            found.text = (found.text or "") + child
    return found


def table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[str] = ()
) -> Element:
    """A table; the first of its columns names the rows.

    Args:
        words: headings of columns that hold words rather than numbers.
    """
    looks = [{"class_": "words"} if heading in words else {} for heading in headings]
    head = [
        el("th", heading, scope="col", **look)
        for heading, look in zip(headings, looks, strict=True)
    ]
    body = [
        el(
            "tr",
            el("th", name, scope="row"),
            *(el("td", cell, **look) for cell, look in zip(cells, looks[1:], strict=True)),
        )
        for name, *cells in rows
    ]
    # Wide ones scroll, rather than the page.
    return el(
        "div",
        el("table", el("thead", el("tr", *head)), el("tbody", *body)),
        class_="wide",
    )


def document(title: str, style: str, *children: Child) -> str:
    """A whole page."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", title),
        el("style", style),
    )
    page = el("html", head, el("body", el("main", *children)), lang="en")
    return "<!DOCTYPE html>\n" + tostring(page, encoding="unicode", method="html") + "\n"


def _said(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)

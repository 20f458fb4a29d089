"""A part of a product of cases for the quick tests, and all of it for the slow ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import pytest

Axis = Mapping[str, Any] | Sequence[Any]


def thinned(every: int, **axes: Axis) -> pytest.MarkDecorator:
    """Parametrizes by the product of the axes; one case in `every` is quick, the others are marked slow.

    Quick are those whose places in their axes add up to a multiple of `every`. So each value of each axis is
    among them where another axis has as many values as that.

    Args:
        axes: by parameter, values by the id that a test shows, or values that show themselves.
    """
    named = {
        name: axis if isinstance(axis, Mapping) else {str(value): value for value in axis}
        for name, axis in axes.items()
    }
    cases = []
    for places in product(*(enumerate(axis.items()) for axis in named.values())):
        marks = [] if sum(place for place, _ in places) % every == 0 else [pytest.mark.slow]
        shown = "-".join(label for _, (label, _) in places)
        cases.append(pytest.param(*(value for _, (_, value) in places), id=shown, marks=marks))
    return pytest.mark.parametrize(tuple(named), cases)

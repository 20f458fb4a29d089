"""Schema versions of what is saved: older ones are brought up to date, newer ones refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from modelopt_sparse.errors import StateError, describe, shown

Steps = Mapping[int, Callable[[Mapping[str, Any]], Mapping[str, Any]]]
"""By version, what makes content of that version content of the next. They may raise StateError."""


def unchanged(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The step where the next version only may say more."""
    return content


def newest(steps: Steps) -> int:
    """The version that is written."""
    return len(steps) + 1


def up_to_date(place: str, content: Mapping[str, Any], key: str, steps: Steps) -> Mapping[str, Any]:
    """`content` in the newest version.

    Args:
        place: what messages call it, up to the key.
        key: where it says its version.
        steps: one for each version from 1 on, but the newest.
    Raises:
        StateError: the version isn't one, or it is newer than what this package reads.
    """
    name, version, last = f"{place}{key}", content.get(key), newest(steps)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise StateError(describe(name, shown(version), f"an int from 1 to {last}"))
    if version > last:
        raise StateError(
            describe(name, shown(version), f"at most {last}", "Update modelopt_sparse.")
        )
    for old in range(version, last):
        content = steps[old](content)
    return content

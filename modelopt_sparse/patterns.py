"""The one place that says which modules a pattern stands for.

A pattern is a string or a callable. A string is a case-sensitive glob on a module's dotted name,
where ``*`` crosses dots; ``type:LlamaAttention`` is one on its class's name. ``{a,b}`` and
``{0..15}`` are expanded first. A callable takes the dotted name and the module and returns a bool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fnmatch2 import fnmatchcase2

from .braces import expand_braces
from .errors import ConfigError, describe

Pattern = str | Callable[[str, Any], bool]
"""A glob on dotted names, ``type:`` and a glob on class names, or ``(name, module) -> bool``."""

_TYPE = "type:"
_TAKES = "a glob on dotted names, 'type:' and a class name, or a callable (name, module) -> bool"


@dataclass(frozen=True, eq=False)
class Target:
    """A module that a pattern may stand for.

    Args:
        name: its dotted name in the model; "" is the model itself.
        class_name: the name of its class, as the model's author wrote it.
        module: the module, which callables get.
        causal_self_attention: False for cross-attention and bidirectional attention, which
            wildcards don't reach unless the configuration includes them.
    """

    name: str
    class_name: str
    module: Any
    causal_self_attention: bool = True


def expand(pattern: str) -> list[str]:
    """The globs that a string pattern stands for.

    Raises:
        ConfigError: not a string, empty, with a slash or backslash, or with braces that don't
            expand.
    """
    if not isinstance(pattern, str):
        raise ConfigError(describe("pattern", f"a {type(pattern).__name__}", "a string"))
    return list(_expanded(pattern))


def check_pattern(pattern: object) -> None:
    """Raises ConfigError where `pattern` is neither a callable nor a string that `expand` takes."""
    if isinstance(pattern, str):
        expand(pattern)
    elif isinstance(pattern, type):
        remedy = f"Write 'type:{pattern.__name__}' for the modules of a class."
        raise ConfigError(describe("pattern", f"the class {pattern.__name__}", _TAKES, remedy))
    elif not callable(pattern):
        raise ConfigError(describe("pattern", f"a {type(pattern).__name__}", _TAKES))


def matches(pattern: Pattern, target: Target) -> bool:
    """True where `pattern` stands for `target`.

    Raises:
        ConfigError: the pattern isn't one, or a callable returns something else than a bool.
    """
    if isinstance(pattern, str):
        return any(_glob_matches(glob, target) for glob in _expanded(pattern))
    check_pattern(pattern)
    answer = pattern(target.name, target.module)
    if not isinstance(answer, bool):
        place = f"{pattern_name(pattern)}({target.name!r}, module)"
        raise ConfigError(describe(place, f"a {type(answer).__name__}", "a bool"))
    return answer


def matching(pattern: Pattern, targets: Iterable[Target]) -> list[Target]:
    """Those of `targets` that `pattern` stands for.

    Raises:
        ConfigError: as for `matches`.
    """
    if not isinstance(pattern, str):
        return [target for target in targets if matches(pattern, target)]
    left, found = list(targets), []
    # Glob by glob: each has to be compiled, and few are kept.
    for glob in _expanded(pattern):
        found += [target for target in left if _glob_matches(glob, target)]
        left = [target for target in left if target not in found]
    return found


def names_exactly(pattern: Pattern, target: Target) -> bool:
    """True where `pattern`, once expanded, spells out the target's name or class."""
    if not isinstance(pattern, str):
        return False
    return any(glob in (target.name, _TYPE + target.class_name) for glob in _expanded(pattern))


def pattern_name(pattern: object) -> str:
    """How messages call a pattern: a string quoted, a callable by its name."""
    if callable(pattern):
        return f"<{getattr(pattern, '__qualname__', type(pattern).__qualname__)}>"
    return f"{pattern!r:.120}"


# Every rule asks for every module, and the answer depends on the text alone.
@lru_cache(maxsize=256)
def _expanded(pattern: str) -> tuple[str, ...]:
    if not pattern.strip():
        raise ConfigError(describe("pattern", repr(pattern), _TAKES))
    if "/" in pattern or "\\" in pattern:
        raise ConfigError(
            describe(
                f"pattern {pattern!r:.120}",
                "a slash or backslash",
                "names with dots between the parts",
            )
        )
    globs = expand_braces(pattern)
    for glob in globs:
        if not glob.removeprefix(_TYPE).strip():
            raise ConfigError(
                describe(f"pattern {pattern!r:.120}", f"{glob!r}, which is empty", _TAKES)
            )
    return globs


def _glob_matches(glob: str, target: Target) -> bool:
    if glob.startswith(_TYPE):
        return bool(fnmatchcase2(target.class_name, glob.removeprefix(_TYPE)))
    # fnmatch2 cuts names at slashes and then matches prefixes only. No pattern can spell a slash,
    # so another character stands in for it.
    return bool(fnmatchcase2(target.name.replace("/", "\0").replace("\\", "\0"), glob))

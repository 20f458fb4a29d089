"""Expands ``{a,b}`` and ``{0..15}`` in a pattern, because globs know neither."""

from __future__ import annotations

import re

from .errors import ConfigError, describe

MAX_EXPANSIONS = 4096
"""So many patterns one pattern may stand for; more is a typo."""

MAX_CHARACTERS = 2**18
"""So many characters they may have together."""

MAX_LENGTH = 4096
"""A pattern has so many characters at most."""

MAX_DEPTH = 16
"""So deeply braces may be nested."""

_TEXT = re.compile(r"[^{}]*")
_TEXT_IN_BRACES = re.compile(r"[^{},]*")
_RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})", re.ASCII)


def expand_braces(pattern: str) -> tuple[str, ...]:
    """The patterns that `pattern` stands for, in order, each once.

    ``{a,b}`` is one of the alternatives; braces nest; an alternative ``0..15`` is every number from
    0 to 15.

    Raises:
        ConfigError: longer than `MAX_LENGTH`, a brace without its partner, empty braces, braces
            nested deeper than `MAX_DEPTH`, a range that isn't two whole numbers in rising order, or
            more than `MAX_EXPANSIONS` patterns or `MAX_CHARACTERS` characters in them.
    """
    reader = _Reader(pattern)
    if len(pattern) > MAX_LENGTH:
        raise reader.refused(f"{len(pattern)} characters", f"at most {MAX_LENGTH}")
    return tuple(dict.fromkeys(reader.sequence(depth=0)))


class _Reader:
    """Reads a pattern from left to right, once."""

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.position = 0

    def sequence(self, depth: int) -> list[str]:
        """Text and braces up to the end of the pattern, or inside braces of the alternative."""
        found = [""]
        while self.position < len(self.pattern):
            character = self.pattern[self.position]
            if depth and character in ",}":
                break
            if character == "}":
                raise self.refused("a '}' without its '{'", "balanced braces")
            endings = self.braces(depth + 1) if character == "{" else [self.text(depth)]
            if len(found) * len(endings) > MAX_EXPANSIONS:
                raise self.too_many()
            found = [start + end for start in found for end in endings]
            if sum(map(len, found)) > MAX_CHARACTERS:
                raise self.too_many()
        return found

    def text(self, depth: int) -> str:
        """As much as means itself, which outside braces a comma does too."""
        start = self.position
        match = (_TEXT_IN_BRACES if depth else _TEXT).match(self.pattern, start)
        self.position = match.end() if match else start
        return self.pattern[start : self.position]

    def braces(self, depth: int) -> list[str]:
        """The alternatives between a brace and its partner."""
        self.position += 1
        if depth > MAX_DEPTH:
            raise self.refused(f"braces {depth} deep", f"braces at most {MAX_DEPTH} deep")
        found: list[str] = []
        while True:
            start = self.position
            alternatives = self.sequence(depth)
            text = self.pattern[start : self.position]
            found += self.numbers(text) if ".." in text and "{" not in text else alternatives
            if len(found) > MAX_EXPANSIONS:
                raise self.too_many()
            if self.position == len(self.pattern):
                raise self.refused("a '{' without its '}'", "balanced braces")
            self.position += 1
            if self.pattern[self.position - 1] == "}":
                break
        if found == [""]:
            raise self.refused("empty braces", "alternatives between braces")
        return found

    def numbers(self, text: str) -> list[str]:
        """The numbers of a range such as ``0..15``."""
        match = _RANGE.fullmatch(text)
        first, last = (int(end) for end in match.groups()) if match else (1, 0)
        if first > last:
            raise self.refused(
                f"the range {text!r:.60}", "ranges of whole numbers in rising order, like 0..15"
            )
        if last - first >= MAX_EXPANSIONS:
            raise self.too_many()
        return [str(number) for number in range(first, last + 1)]

    def too_many(self) -> ConfigError:
        return self.refused(
            f"more than {MAX_EXPANSIONS} expansions, or more than {MAX_CHARACTERS} characters in them",
            "fewer",
            "Use a wildcard.",
        )

    def refused(self, got: str, takes: str, remedy: str = "") -> ConfigError:
        return ConfigError(describe(f"pattern {self.pattern!r:.120}", got, takes, remedy))

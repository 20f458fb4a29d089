"""Marked blocks of a document, whose text is written from files of results.

A block begins with the line ``<!-- KIND: FILE NAME... -->``, FILE seen from the document's folder, and ends
with ``<!-- /KIND -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from modelopt_sparse.errors import ArgumentError, describe


@dataclass(frozen=True)
class Blocks:
    """The blocks of one kind."""

    kind: str

    @property
    def _begin(self) -> str:
        return f"<!-- {self.kind}:"

    @property
    def _end(self) -> str:
        return f"<!-- /{self.kind} -->"

    @property
    def _pattern(self) -> re.Pattern[str]:
        begin, end = self._begin, self._end
        line = rf"{begin} (\S+)((?: [\w-]+)+) -->\n"
        return re.compile(rf"({line})((?:(?!{begin}).)*?)({end})", flags=re.DOTALL)

    def shown(self, text: str) -> list[tuple[str, list[str]]]:
        """The file and the names of each whole block."""
        return [(file, names.split()) for _, file, names, _, _ in self._pattern.findall(text)]

    def rewritten(self, document: Path, content: Callable[[Path, list[str]], str]) -> str:
        """The text of a document with its blocks written anew.

        Args:
            content: what stands in a block, of its file and names.

        Raises:
            ArgumentError: there is no block, or one has no end or no name.
            OSError: the document can't be read.
        """

        def block(found: re.Match[str]) -> str:
            begin, file, names, _, end = found.groups()
            return f"{begin}\n{content(document.parent / file, names.split())}\n{end}"

        text = document.read_text()
        begun, whole = text.count(self._begin), len(self.shown(text))
        if not whole or begun != whole:
            got = f"{begun} begun, {whole} whole"
            takes = f"{self._begin} FILE NAME... --> to {self._end}, one or more"
            raise ArgumentError(describe("blocks", got, takes))
        return self._pattern.sub(block, text)

"""Hooks of mkdocs: the pages that are made when the site is built.

The changelog, which the repository keeps as reStructuredText, and the public names, from their docstrings.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_UNDERLINES = {"=": "#", "-": "##", "~": "###"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds changelog.md and api.md."""
    root = Path(config.config_file_path).parent
    changelog = as_markdown((root / "CHANGELOG.rst").read_text(encoding="utf-8"))
    files.append(File.generated(config, "changelog.md", content=changelog))
    reference = runpy.run_path(str(root / "docs/reference.py"))
    files.append(File.generated(config, "api.md", content=reference["names_page"]()))
    return files


def as_markdown(text: str) -> str:
    """Headings with an underline as Markdown's; lists and literals are alike in both.

    Raises:
        ValueError: there is other markup than headings, lists and literals.
    """
    lines: list[str] = []
    for line in text.splitlines():
        if lines and line and line[0] in _UNDERLINES and line == line[0] * len(lines[-1]):
            lines[-1] = f"{_UNDERLINES[line[0]]} {lines[-1]}"
        elif re.search(r"^\.\. |::$|`_|:\w+:`|^[=~^\"-]{4,}$", line):
            raise ValueError(f"CHANGELOG.rst: markup that isn't read: {line!r}")
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"

"""Cells of several runs in one file.

python -m examples.quality.merge a.json b.json --json docs/quality/h200.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from examples.quality.cells import Cell, added, load, save
from examples.quality.tables import summary
from modelopt_sparse.errors import ArgumentError, describe

COMMIT = "commit"


def merged(files: Sequence[Path]) -> tuple[dict[str, str], list[Cell]]:
    """What they were measured on, and their cells, added up.

    Commits may differ, and all are named: runs that fill a gap come later.

    Raises:
        ArgumentError: anything else of what they were measured on differs, or two files have the same
            samples.
    """
    loaded = [load(path) for path in files]
    (first, _), *others = loaded
    for path, (where, _) in zip(files[1:], others, strict=True):
        for name in {**first, **where}:
            one, other = first.get(name), where.get(name)
            if one != other and name != COMMIT:
                got = f"{one} in {files[0]}, {other} in {path}"
                raise ArgumentError(describe(name, got, "files of one environment"))
    # Each may be of several by now.
    commits = ", ".join(where[COMMIT] for where, _ in loaded).split(", ")
    cells = added(cell for _, found in loaded for cell in found)
    return {**first, COMMIT: ", ".join(dict.fromkeys(commits))}, cells


def main(
    files: Annotated[list[Path], typer.Argument(help="What runs of one model wrote.")],
    json_file: Annotated[Path, typer.Option("--json", help="All in one file.")],
) -> None:
    """Add up the cells of files; print a line each."""
    try:
        where, cells = merged(files)
    except ArgumentError as error:
        raise typer.BadParameter(str(error)) from None
    save(json_file, where, cells)
    for cell in cells:
        typer.echo(summary(cell))


if __name__ == "__main__":
    typer.run(main)

"""Saved rows as Markdown, alone or in the marked blocks of a document.

``python -m modelopt_sparse.bench.tables rows.json`` prints every row;
``python -m modelopt_sparse.bench.tables --into README.md`` writes `blocks` of kind ``bench`` anew, whose
names are groups of cases.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from modelopt_sparse.errors import ArgumentError, describe

from .baselines import COPY, PRODUCT
from .blocks import Blocks
from .report import load
from .run import Row

BLOCKS = Blocks("bench")
HEADINGS = ("case", "others, the fastest first", "own", "bound", "skipped", "error")


def markdown_of(where: dict[str, Any], rows: Sequence[Row]) -> str:
    """What was measured on, and a table for each group; in place of a ratio why there is none."""
    lines = [_said(where)]
    for group, members in groupby(rows, key=lambda row: row.group):
        lines += ["", *_table((group, "beside", "ratio", "skipped", "error"))]
        for row in members:
            ratio = row.note if row.ratio is None else f"{row.ratio:.2f}"
            lines.append(_line((row.case, row.peer, ratio, _share(row), _error(row))))
    return "\n".join(lines) + "\n"


def summary_of(where: dict[str, Any], rows: Sequence[Row]) -> str:
    """What was measured on, and a line a case: its ratios to others' kernels, to our own, and to a bound.

    Behind a ratio stands what is to be said of it; in place of all, why a case failed.
    """
    lines = [_said(where), "", *_table(HEADINGS)]
    for case, members in groupby(rows, key=lambda row: row.case):
        of_case = list(members)
        timed = sorted((x for x in of_case if x.ratio is not None), key=lambda x: x.ratio or 0.0)
        if not timed:
            lines.append(_line((case, of_case[0].note, "", "", "", _error(of_case[0]))))
        else:
            rivals = ", ".join(f"{x.peer} {_ratio(x)}" for x in timed if x.is_rival)
            own = ", ".join(
                f"{x.peer.removeprefix('own ')} {_ratio(x)}"
                for x in timed
                if not x.is_rival and x.peer not in (COPY, PRODUCT)
            )
            bounds = ", ".join(
                f"{x.peer.partition(' ')[0]} {x.ratio:.2f}"
                for x in timed
                if x.peer in (COPY, PRODUCT)
            )
            lines.append(_line((case, rivals, own, bounds, _share(timed[0]), _error(timed[0]))))
    return "\n".join(lines) + "\n"


def refreshed(document: Path) -> str:
    """The text of a document with its blocks written anew from their files.

    Raises:
        ArgumentError: as `Blocks.rewritten`, or a block names a group of which its file has no row.
        OSError, ValueError, TypeError, KeyError: as `report.load`.
    """

    def content(file: Path, groups: list[str]) -> str:
        where, rows = load(file)
        lacks = set(groups) - {row.group for row in rows}
        if lacks:
            raise ArgumentError(
                describe("block", " ".join(sorted(lacks)), f"groups of {file.name}")
            )
        return summary_of(where, [row for row in rows if row.group in groups])

    return BLOCKS.rewritten(document, content)


def _said(where: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in where.items() if value)


def _table(headings: Sequence[str]) -> list[str]:
    return [_line(headings), "|" + "---|" * len(headings)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _ratio(row: Row) -> str:
    return f"{row.ratio:.2f}" + f" ({row.note})" * bool(row.note)


def _share(row: Row) -> str:
    return "" if row.sparsity is None else f"{row.sparsity:.1%}"


def _error(row: Row) -> str:
    return "" if row.error is None else f"{row.error:.4f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 2 if there is no such file, or it holds no rows."""
    parser = argparse.ArgumentParser(
        prog="python -m modelopt_sparse.bench.tables", description="Saved rows as Markdown."
    )
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("rows", nargs="?", type=Path, help="what --json of the benchmark wrote")
    chosen.add_argument("--into", type=Path, metavar="DOCUMENT", help="write its blocks anew")
    options = parser.parse_args(argv)
    try:
        if options.into is not None:
            options.into.write_text(refreshed(options.into))
        else:
            print(markdown_of(*load(options.rows)), end="")
    except (OSError, ValueError, TypeError, KeyError) as error:
        print(f"{options.into or options.rows}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``python -m modelopt_sparse.bench.tables rows.json``: saved rows as Markdown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from .report import load
from .run import Row


def markdown_of(where: dict[str, Any], rows: Sequence[Row]) -> str:
    """What was measured on, and a table for each group; in place of a ratio why there is none."""
    lines = [", ".join(f"{name} {value}" for name, value in where.items() if value)]
    for group, members in groupby(rows, key=lambda row: row.group):
        lines += ["", f"| {group} | beside | ratio | skipped | error |", "|---|---|---|---|---|"]
        for row in members:
            ratio = row.note if row.ratio is None else f"{row.ratio:.2f}"
            skipped = "" if row.sparsity is None else f"{row.sparsity:.1%}"
            error = "" if row.error is None else f"{row.error:.4f}"
            cells = row.case, row.peer, ratio, skipped, error
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 2 if there is no such file, or it holds no rows."""
    paths = sys.argv[1:] if argv is None else argv
    if len(paths) != 1:
        print("usage: python -m modelopt_sparse.bench.tables ROWS.json", file=sys.stderr)
        return 2
    try:
        where, rows = load(Path(paths[0]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        print(f"{paths[0]}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(markdown_of(where, rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""``modelopt-sparse bench``: hands its arguments to ``python -m modelopt_sparse.bench``."""

from __future__ import annotations

from typing import Any

import typer

from .loading import import_libraries

# The benchmark reads its own options, --help too.
SETTINGS: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "add_help_option": False,
}


def command(ctx: typer.Context) -> None:
    """Time the kernels beside others on this GPU, results checked first; `bench --help` has its options.

    Its --json takes a path, where rows are written.
    """
    import_libraries()
    from modelopt_sparse.bench.__main__ import main

    raise typer.Exit(main(ctx.args))

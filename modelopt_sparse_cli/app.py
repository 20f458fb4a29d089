"""The commands, and what exit codes mean. A command is a file with a function, and its line here."""

from __future__ import annotations

import sys
import traceback
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import bench, calibrate, doctor, evaluate, explain, export, quickstart, report, sparsify

FAILED, UNEXPECTED, INTERRUPTED = 2, 70, 130


class Commands(TyperGroup):
    """Runs a command; what stops it becomes a line on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """As click does, without tracebacks for what a user can do something about."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise  # click ends quietly where the reader of a pipe has gone
        except Exception as error:
            if not _is_for_users(error):
                raise
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(FAILED) from None


def _version(is_asked: bool) -> None:
    if is_asked:
        try:
            found = metadata.version("modelopt_sparse")
        except metadata.PackageNotFoundError:  # a clone that isn't installed, which takes longer
            from modelopt_sparse.version import __version__ as found
        typer.echo(f"modelopt-sparse {found}")
        raise typer.Exit()


app = typer.Typer(
    cls=Commands,
    name="modelopt-sparse",
    help="Sparse attention for Hugging Face models.",
    epilog="Exit codes: 0 done; 1 the check found a problem; 2 wrong usage, or an error, which is printed; "
    "70 an unexpected error, with its traceback; 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_version
        ),
    ] = False,
) -> None:
    """Options of the command itself."""


app.command("quickstart")(quickstart.command)
app.command("sparsify")(sparsify.command)
app.command("calibrate")(calibrate.command)
app.command("eval")(evaluate.command)
app.command("export")(export.command)
app.command("report")(report.command)
app.command("explain")(explain.command)
app.command("doctor")(doctor.command)
app.command("bench", **bench.SETTINGS)(bench.command)


def main() -> None:
    """The command line's entry."""
    try:
        app(prog_name="modelopt-sparse")
    except KeyboardInterrupt:  # before a command runs
        typer.echo("Interrupted.", err=True)
        sys.exit(INTERRUPTED)
    except Exception:  # left to Python it would end with 1, as a check that found a problem
        traceback.print_exc()
        sys.exit(UNEXPECTED)


def _is_for_users(error: Exception) -> bool:
    """Whether the message is all that a user needs: an error of ours, or of a file."""
    ours = sys.modules.get("modelopt_sparse.errors")  # without it, it can't be one of them
    return isinstance(error, OSError) or (
        ours is not None and isinstance(error, ours.SparseAttentionError)
    )

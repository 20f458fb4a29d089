"""Folders and files that are written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

# What makes a folder a checkpoint: another one isn't replaced, whatever is in it.
MARK = "config.json"


def check_output(folder: Path, force: bool) -> None:
    """Raises typer.BadParameter where `folder` holds something that shall not be replaced."""
    if folder.exists() and not folder.is_dir():
        raise typer.BadParameter(f"--output: got the file {str(folder)!r}; takes a folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / MARK).is_file():
        got = f"{str(folder)!r}, which holds other things than a checkpoint"
        raise typer.BadParameter(f"--output: got {got}; takes a new or empty folder.")
    if not force:
        got = f"{str(folder)!r}, which holds a checkpoint"
        raise typer.BadParameter(
            f"--output: got {got}; takes a new or empty folder. Replace it with --force."
        )


def check_output_file(path: Path, force: bool) -> None:
    """Raises typer.BadParameter where something lies at `path` that shall not be replaced."""
    if path.is_dir():
        raise typer.BadParameter(f"--output: got the folder {str(path)!r}; takes a file.")
    if path.exists() and not force:
        got = f"{str(path)!r}, which is there already"
        raise typer.BadParameter(f"--output: got {got}; takes a new file. Replace it with --force.")


def write_whole(path: Path, text: str) -> None:
    """Writes a file, or leaves it as it was."""
    from modelopt_sparse.files import written_whole

    path.resolve().parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as new:
        new.write_text(text, encoding="utf-8")


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """An empty folder to write into; it becomes `folder` at the end of the block, and is gone if that fails.

    What `folder` held is replaced.
    """
    from modelopt_sparse.files import written_whole

    folder.resolve().parent.mkdir(parents=True, exist_ok=True)
    with written_whole(folder) as new:
        new.mkdir()
        yield new

"""Commands in the pages exist, and take the options that they are shown with."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
from functools import cache

import pytest
import typer.main

from modelopt_sparse_cli import app
from tests.blocks import ROOT

_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def commands() -> list[tuple[str, ...]]:
    """Every command line of a shell block, once, as words, without its comment."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    found = {}
    for page in pages:
        for block in _BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if words := tuple(shlex.split(line, comments=True)):
                    found[words] = None
    return list(found)


def program_of(words: tuple[str, ...]) -> tuple[str, ...]:
    """The module, or the script, and the subcommand that a line runs."""
    first, *others = words
    if first == "modelopt-sparse":
        return "modelopt_sparse", others[0]
    assert first in ("python", ".venv/bin/python"), f"no command of ours: {words}"
    return (others[1] if others[0] == "-m" else others[0],)


@cache
def help_of(program: tuple[str, ...]) -> str:
    """Run here and not in a process of its own, which would import torch for each."""
    name, *subcommand = program
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", [name, *subcommand, "--help"])
        for variable, value in (("COLUMNS", "300"), ("NO_COLOR", "1"), ("TERM", "dumb")):
            patch.setenv(variable, value)
        patch.syspath_prepend(ROOT)
        with pytest.raises(SystemExit) as end:
            if name.endswith(".py"):
                runpy.run_path(str(ROOT / name), run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert not end.value.code, said.getvalue()
    return said.getvalue()


def unknown(words: tuple[str, ...]) -> list[str]:
    """Options that the program doesn't list."""
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    listed = re.findall(r"--[\w-]+", help_of(program_of(words)))
    return [option for option in options if option not in listed]


@pytest.mark.parametrize("words", commands(), ids=shlex.join)
def test_a_command_of_a_page_exists_and_takes_its_options(words):
    if words[0] == "make":
        assert words[1] in TARGETS
    elif words[0] not in ("pip", "apt-get"):
        assert not unknown(words)


@pytest.mark.parametrize("page", ["README.md", "docs/command.md"])
def test_a_page_about_the_command_has_every_subcommand(page):
    block = _BLOCK.search((ROOT / page).read_text().partition("# The command")[2])[1]
    shown = [shlex.split(line)[1] for line in block.splitlines()]
    assert sorted(shown) == sorted(typer.main.get_command(app).commands)


def test_an_option_that_is_not_there_is_seen():
    assert unknown(("python", "-m", "examples.quality.tables", "--into", "--onto")) == ["--onto"]
    with pytest.raises(ImportError):
        help_of(("examples.no_such",))

"""Runs the Python blocks of Markdown pages, those of one page in order and in one namespace.

``python -m tests.blocks README.md docs/kernels.md``, in the repository's root. A block that begins with
```` ```python {.gpu} ```` is compiled only where there is no GPU.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"^```python(?P<info>[^\n]*)\n(?P<source>.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Args:
        line: number of lines before it on the page.
        needs_gpu: it is marked so.
    """

    source: str
    line: int
    needs_gpu: bool


def blocks_of(text: str) -> list[Block]:
    """The Python blocks of a page.

    Raises:
        ValueError: a block has a mark that isn't known.
    """
    found = []
    for match in _BLOCK.finditer(text):
        info, line = match["info"].strip(), text[: match.start("source")].count("\n")
        if info not in ("", "{.gpu}"):
            raise ValueError(f"line {line}: ```python {info}")
        found.append(Block(match["source"], line, info == "{.gpu}"))
    return found


def pages() -> Iterator[Path]:
    """Every page with a Python block."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        if blocks_of(page.read_text(encoding="utf-8")):
            yield page


def run(page: Path) -> None:
    """Runs the blocks of a page in a folder that has links to all that is in the repository's root.

    Files that they write beside these are gone afterwards. Raises what a block raises.
    """
    import torch

    # Like a script's: pickle, pydantic and others look classes up in their module.
    module = sys.modules["__main__"] = ModuleType("__main__")
    with tempfile.TemporaryDirectory() as folder:
        for entry in ROOT.iterdir():
            (Path(folder) / entry.name).symlink_to(entry)
        os.chdir(folder)
        try:
            for block in blocks_of(page.read_text(encoding="utf-8")):
                # Lines count from the page's first, so that tracebacks show them.
                source = "\n" * block.line + block.source
                code = compile(source, str(page), "exec", dont_inherit=True)
                if not block.needs_gpu or torch.cuda.is_available():
                    exec(code, module.__dict__)
        finally:
            os.chdir(ROOT)


def serve(paths: Iterator[str]) -> bool:
    """Runs pages, each in a process that has imported what takes long. Whether all ran."""
    import transformers  # noqa: F401

    import modelopt_sparse  # noqa: F401

    good = True
    for path in paths:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            code = 1
            try:
                os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
                run(ROOT / path.strip())
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        good = good and status == 0
        print(f"{path.strip()}: {'ran' if status == 0 else 'FAILED'}", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(not serve(iter(sys.argv[1:] or sys.stdin)))

"""Files that anyone may have written, read within limits; files and folders written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .errors import ConfigError, SparseAttentionError, describe

MAX_JSON_VALUES = 10_000_000
"""A JSON text holds about so many values at most: a short text could fill much memory."""


def read_bytes(path: Path, max_bytes: int, error: type[SparseAttentionError]) -> bytes:
    """The content of a file, of which no more is read than may be.

    Raises:
        FileNotFoundError: nothing there.
        error: a folder, pipe or device; or more than `max_bytes`.
    """
    check_is_file(path, error)
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise error(describe(str(path), "a larger file", f"at most {max_bytes} bytes"))
    return content


def read_text(path: Path, name: str, error: type[SparseAttentionError]) -> str:
    """The text of a file in UTF-8, without its byte order mark.

    Args:
        name: what messages call it.

    Raises:
        FileNotFoundError: nothing there.
        error: its bytes aren't UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        got, remedy = (
            f"{str(path)!r}, whose bytes aren't UTF-8",
            "Convert it, for instance with iconv.",
        )
        raise error(describe(name, got, "text in UTF-8", remedy)) from None


def check_is_file(path: Path, error: type[SparseAttentionError]) -> None:
    """Raises FileNotFoundError where nothing is, and `error` where something else than a file is."""
    if not path.exists():
        raise FileNotFoundError(path)
    if not path.is_file():
        got = f"the folder {str(path)!r}" if path.is_dir() else f"{str(path)!r}, which is none"
        raise error(describe("path", got, "a file"))


def parse_json(content: bytes) -> Any:
    """What a JSON text says: UTF-8, each key once. As Python does, it takes NaN and Infinity.

    Raises:
        ConfigError: a key twice.
        ValueError, RecursionError: not JSON, too many values, or nested too deeply.
    """
    text = content.decode("utf-8-sig")
    if sum(map(text.count, ",[{")) > MAX_JSON_VALUES:
        raise ValueError(f"more than {MAX_JSON_VALUES} values")
    return json.loads(text, object_pairs_hook=_once)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place to write a file or a folder at, which becomes `path` at the end of the block.

    It is gone if the block fails; then `path` is as before. A link stays one, and what is replaced hands its
    mode on. A process that is killed leaves a hidden folder beside it at most.

    Raises:
        OSError: what is there is a pipe or device, or can't be replaced.
    """
    path = path.resolve()
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(describe("path", f"{str(path)!r}, a pipe or device", "a file or folder"))
    with TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        yield new
        if new.is_file():
            _to_disk(new)
        if path.exists():
            shutil.copymode(path, new)
        if not (new.is_dir() and path.is_dir()):
            os.replace(new, path)
            return
        # The system puts a folder in the place of an empty one only.
        try:
            os.replace(path, old)
            os.replace(new, path)
        except BaseException:
            if not path.exists():
                os.replace(old, path)
            raise


def _to_disk(path: Path) -> None:
    """Waits until a file is on the disk: its new name may get there before its content does."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ConfigError(describe("key", f"{twice!r:.100} twice", "each key once"))
    return found

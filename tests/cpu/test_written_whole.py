"""Files and folders are written whole or not at all, whenever the process ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import modelopt_sparse as mtsa
from modelopt_sparse.files import written_whole
from modelopt_sparse.modes import checkpoint
from tests.cpu import tiny
from tests.cpu.tiny import FLASH, SKIP, snapshot

RULES = mtsa.SparseAttentionConfig(sparse_cfg={"*": {"method": "triton_skip_softmax"}})


def _content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(".")
    }


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_what_was_written_is_there_and_nothing_else(there, tmp_path):
    path = tmp_path / "a.json"
    if there:
        path.write_text("old")
    with written_whole(path) as new:
        new.write_text("new")
        assert path.exists() is there
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_takes_the_place_of_a_folder(tmp_path):
    for name in ("one", "two"):
        with written_whole(tmp_path / "folder") as new:
            new.mkdir()
            (new / name).write_text(name)
    assert _content(tmp_path) == {"folder/two": b"two"}


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("a")
    with pytest.raises(IsADirectoryError), written_whole(tmp_path / "folder") as new:
        new.write_text("new")
    assert _content(tmp_path) == {"folder/a": b"a"}


def test_a_link_stays_one(tmp_path):
    (tmp_path / "target.json").write_text("old")
    (tmp_path / "link.json").symlink_to("target.json")
    with written_whole(tmp_path / "link.json") as new:
        new.write_text("new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "target.json").read_text() == "new"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_replaced_hands_its_mode_on(kind, tmp_path):
    path = tmp_path / "a"
    path.mkdir() if kind == "folder" else path.write_text("old")
    path.chmod(0o700)
    with written_whole(path) as new:
        new.mkdir() if kind == "folder" else new.write_text("new")
    assert path.stat().st_mode & 0o777 == 0o700


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="a pipe or device"), written_whole(tmp_path / "pipe") as new:
        new.write_text("new")
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


@pytest.mark.parametrize(("renames", "left"), [(1, "old"), (2, "new")])
def test_an_interrupt_right_after_a_rename_leaves_one_folder_whole(
    renames, left, tmp_path, monkeypatch
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("old")
    calls, replace = [], os.replace

    def interrupted(source, target):
        replace(source, target)
        calls.append(target)
        if len(calls) == renames:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "folder") as new:
        new.mkdir()
        (new / "new").write_text("new")
    assert _content(tmp_path) == {f"folder/{left}": left.encode()}
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("failing", ["the block", "os.replace", "the second os.replace"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failure_leaves_what_was_there(kind, failing, tmp_path, monkeypatch):
    path = tmp_path / "a"
    if kind == "folder":
        path.mkdir()
        (path / "old").write_text("old")
    else:
        path.write_text("old")
    before, calls, replace = _content(tmp_path), [], os.replace

    def failing_replace(source, target):
        calls.append(target)
        if len(calls) == {"os.replace": 1, "the second os.replace": 2}.get(failing):
            raise OSError("full")
        replace(source, target)

    if failing == "the second os.replace" and kind == "file":
        return
    monkeypatch.setattr(os, "replace", failing_replace)
    with pytest.raises(OSError, match="full"), written_whole(path) as new:
        if kind == "folder":
            new.mkdir()
        (new / "new" if kind == "folder" else new).write_text("half")
        if failing == "the block":
            raise OSError("full")
    assert _content(tmp_path) == before
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_configuration_that_cannot_be_written_leaves_the_old_one(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"c.{suffix}"
    RULES.save(path)

    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:9])
        raise OSError("full")

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError, match="full"):
        RULES.with_rule("*attn", enable=False).save(path)
    assert mtsa.SparseAttentionConfig.load(path) == RULES
    assert os.listdir(tmp_path) == [path.name]


def test_a_configuration_too_long_to_be_read_is_not_written(tmp_path):
    rules = {f"*{n}{'x' * 1000}": {"enable": False} for n in range(1100)}
    for suffix in ("json", "yaml"):
        path = tmp_path / f"c.{suffix}"
        with pytest.raises(mtsa.ConfigError, match="takes at most"):
            mtsa.SparseAttentionConfig(sparse_cfg=rules).save(path)
        assert not path.exists()


# Kills itself when the weights of the second model are half there.
KILLED = """
import os, signal, sys
import modelopt_sparse as mtsa
from modelopt_sparse.modes import checkpoint
from tests.cpu import tiny

def half(model, path, metadata):
    with open(path, "wb") as file:
        file.write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save_model = half
mtsa.save(mtsa.sparsify(tiny.tiny_llama(), tiny.FLASH), sys.argv[1])
"""


def test_a_process_that_is_killed_leaves_the_old_checkpoint(tmp_path):
    model = mtsa.sparsify(tiny.tiny_llama(), SKIP)
    mtsa.save(model, tmp_path)
    before = _content(tmp_path)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=120)
    assert killed.returncode == -9
    assert _content(tmp_path) == before
    restored = mtsa.restore(tiny.tiny_llama(), tmp_path)
    assert mtsa.modelopt_state(restored) == mtsa.modelopt_state(model)


def test_files_of_two_saves_are_refused(tmp_path, monkeypatch):
    mtsa.save(mtsa.sparsify(tiny.tiny_llama(), SKIP), tmp_path)
    before, replace = _content(tmp_path), os.replace
    with monkeypatch.context() as patch:

        def stop_at_the_state(source, target):
            if target.name == checkpoint.STATE_FILE:
                raise KeyboardInterrupt
            replace(source, target)

        patch.setattr(os, "replace", stop_at_the_state)
        with pytest.raises(KeyboardInterrupt):
            mtsa.save(mtsa.sparsify(tiny.tiny_llama(), FLASH), tmp_path)
    after = _content(tmp_path)
    changed = [name for name in before if after[name] != before[name]]
    assert changed == [checkpoint.WEIGHTS_FILE]
    model = tiny.tiny_llama()
    unchanged = snapshot(model)
    with pytest.raises(mtsa.StateError, match="of another save"):
        mtsa.restore(model, tmp_path)
    assert snapshot(model) == unchanged
    # Saving again mends it.
    again = mtsa.sparsify(tiny.tiny_llama(), FLASH)
    mtsa.save(again, tmp_path)
    restored = mtsa.restore(tiny.tiny_llama(), tmp_path)
    assert mtsa.modelopt_state(restored) == mtsa.modelopt_state(again)

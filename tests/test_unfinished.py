"""Folders and files that appear whole or not at all."""

import fcntl
import os
from pathlib import Path

from lora_rm.unfinished import UnfinishedFolder, has_lock, write_atomically


def test_what_changed_since_it_was_finished_is_done_again(tmp_path):
    UnfinishedFolder(tmp_path, 1).once("a", lambda file: file.write_text("whole"))
    assert UnfinishedFolder(tmp_path, 1).finished
    (tmp_path / "a").write_text("changed since")
    assert not UnfinishedFolder(tmp_path, 1).finished
    assert not (tmp_path / "a").exists()


def test_a_file_gets_its_name_when_it_is_on_the_disk(tmp_path, monkeypatch):
    done, flush, replace = [], os.fsync, Path.replace

    def flushed(number):
        done.append(Path(f"/proc/self/fd/{number}").readlink().name)
        flush(number)

    def replaced(path, target):
        done.append(Path(target).name)
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", replaced)
    write_atomically(tmp_path / "a", "text")
    assert done == [".a.partial", "a"]


def test_a_disk_without_locks_can_be_used(monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert has_lock(0)

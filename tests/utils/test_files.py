import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from sasa_det.utils.files import whole_file, whole_folder, write_text

# Begins to write the file of its argument, says so and waits.
_FILES = Path("sasa_det/utils/files.py").resolve()
_WRITER = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("files", {str(_FILES)!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
with files.whole_file(sys.argv[1]) as part:
    part.write_text("half of it")
    print("writing", flush=True)
    sys.stdin.read()
"""


@contextmanager
def writer_of(path):
    command = [sys.executable, "-c", _WRITER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        yield process


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_and_its_folder_are_made(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "text\n")
    write_text(tmp_path / "a" / "b.txt", "another ä\n")
    assert (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == "another ä\n"
    assert names(tmp_path / "a") == ["b.txt"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    write_text(tmp_path / "whole", "")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_error_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyError), whole_file(path) as part:
        part.write_text("new")
        raise KeyError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_block_that_writes_nothing_leaves_the_old_file_alone(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "a.txt"):
        pass
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_failing_disk_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError):
            write_text(path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_what_a_killed_process_left_is_replaced_by_the_next_write(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with writer_of(path) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert path.read_text() == "old"
    assert names(tmp_path) == [".writing.txt", "a.txt"]
    write_text(tmp_path / "b.txt", "")
    assert names(tmp_path) == ["a.txt", "b.txt"]


def test_writers_of_one_folder_wait_for_each_other(tmp_path):
    """The second one begins when the first one has ended, and both files are whole."""
    with writer_of(tmp_path / "a.txt") as first:
        command = [sys.executable, "-c", _WRITER, str(tmp_path / "b.txt")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as second:
            second.stdin.close()
            with pytest.raises(subprocess.TimeoutExpired):
                second.wait(timeout=0.5)
            assert names(tmp_path) == [".writing.txt"]
            first.stdin.close()
            assert first.wait() == 0 and second.wait() == 0
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["half of it"] * 2
    assert names(tmp_path) == ["a.txt", "b.txt"]


def test_a_folder_that_cannot_be_locked(tmp_path, monkeypatch):
    def answer(descriptor, how):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", answer)
    write_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text"


def test_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        steps.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def note_replace(part, path):
        steps.append(("replace", Path(part)))
        replace(part, path)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    with whole_file(tmp_path / "a.txt") as part:
        part.write_text("text")
    assert steps == [("fsync", part), ("replace", part), ("fsync", tmp_path)]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "folder"
    with pytest.raises(KeyboardInterrupt), whole_folder(target) as staging:
        (staging / "half").touch()
        raise KeyboardInterrupt
    assert names(tmp_path / "new") == []
    target.mkdir()
    with whole_folder(target) as staging:
        (staging / "whole").touch()
        assert names(target) == []
    assert names(target) == ["whole"] and names(tmp_path / "new") == ["folder"]
    # Readable by others as other folders are.
    assert target.stat().st_mode == (tmp_path / "new").stat().st_mode
    with pytest.raises(OSError, match="not empty"), whole_folder(target) as staging:
        (staging / "other").touch()
    assert names(target) == ["whole"] and names(tmp_path / "new") == ["folder"]

"""Writing files whole or not at all."""

import errno
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["whole_file", "write_text"]


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Give a path to write to, which is renamed to ``path`` when the block ends without error.

    What is written is on the disk, and not in memory alone, before it takes the place of an older
    file: after a crash or a kill at any moment ``path`` is the old file or the new one. What a
    killed process leaves beside ``path`` is removed when the next file is written there.

    Args:
        path: the file to write; its folder is made if it is not there.

    Yields:
        Path: a file of the same name in a folder that is removed afterwards.
    """
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".writing-{socket.gethostname()}-"
    _remove_abandoned(path.parent, prefix)
    folder, lock = _make_folder(path.parent, prefix)
    try:
        part = folder / path.name
        yield part
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    finally:
        # What cannot be removed now is removed when the next file is written here.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def _make_folder(parent: Path, prefix: str) -> tuple[Path, int]:
    """Make a folder that this process holds locked as long as it lives."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            lock = _open_lock(folder)
        except FileNotFoundError:
            continue  # another process took it for abandoned before it was locked
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)  # as above
            continue
        except OSError:
            # A file system without locks, where nobody can take the folder for abandoned.
            return folder, lock
        if folder.exists():
            return folder, lock
        os.close(lock)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the folders of processes of this host that no longer live to hold their lock."""
    with os.scandir(parent) as entries:
        folders = [Path(entry) for entry in entries if entry.name.startswith(prefix)]
    for folder in folders:
        if "-" in folder.name.removeprefix(prefix):
            continue  # of another host, whose name begins as this one's
        try:
            lock = _open_lock(folder)
        except OSError:
            continue  # gone by now, or another user's
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        except OSError:
            pass  # its process lives, or the file system has no locks
        finally:
            os.close(lock)


def _open_lock(folder: Path) -> int:
    return os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)

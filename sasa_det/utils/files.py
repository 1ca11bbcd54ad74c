"""Writing files whole or not at all."""

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Give a path to write to, which is renamed to ``path`` when the block ends without error.

    What is written is on the disk, and not in memory alone, before it takes the place of an older
    file: after a crash or a kill at any moment ``path`` is the old file or the new one. The next
    file of this suffix in the folder replaces what a killed process has left. Other processes that
    write to the folder in this way wait; so would a second file that is written in the block.

    Args:
        path: the file to write; its folder is made if it is not there.

    Yields:
        Path: a file of the same folder and suffix, which does not exist yet.
    """
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".writing{path.suffix}")
    with _locked(path.parent) as folder:
        part.unlink(missing_ok=True)
        try:
            yield part
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
            with _ignoring(errno.EINVAL):  # some network file systems cannot
                os.fsync(folder)
        finally:
            part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def require_file(what: str, path: str | os.PathLike) -> None:
    """Raise FileNotFoundError, which names ``what`` and the path, unless a file is there."""
    if not os.path.isfile(path):
        problem = "is a folder, and not a file" if os.path.isdir(path) else "does not exist"
        raise FileNotFoundError(f"{what} {os.fspath(path)} {problem}")


def require_folder(what: str, path: str | os.PathLike) -> None:
    """Raise FileNotFoundError, which names ``what`` and the path, unless a folder is there."""
    if not os.path.isdir(path):
        problem = "is a file, and not a folder" if os.path.exists(path) else "does not exist"
        raise FileNotFoundError(f"{what} {os.fspath(path)} {problem}")


def holds_anything(path: str | os.PathLike) -> bool:
    """Return whether :func:`whole_folder` would refuse a path: it exists and is no empty folder."""
    return os.path.exists(path) and (not os.path.isdir(path) or bool(os.listdir(path)))


@contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Give a folder to write to, which is renamed to ``path`` when the block ends without error.

    Args:
        path: the folder to write; it must not exist, or be empty.

    Yields:
        Path: an empty folder beside it, of the same name.

    Raises:
        OSError: if ``path`` holds anything when the block ends, as of another process.
    """
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        # A subfolder, because the temporary folder itself is readable by its owner only.
        staging = Path(folder, path.name)
        staging.mkdir()
        yield staging
        os.rename(staging, path)


def write_folder_once(path: str | os.PathLike, write: Callable[[Path], None]) -> bool:
    """Write a folder as :func:`whole_folder` does, unless another process does so meanwhile.

    Args:
        path: the folder to write; it must not exist, or be empty.
        write: writes the files into a folder that it is given.

    Returns:
        bool: False if another process was first, whose folder is left as it is.

    Raises:
        OSError: if the folder cannot be written.
    """
    try:
        with whole_folder(path) as staging:
            write(staging)
    except OSError:
        if not holds_anything(path):
            raise
        return False
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Open a folder, and keep the lock of it in a block where its file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # NFS locks no folders.
        with _ignoring(errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _ignoring(*numbers: int) -> Iterator[None]:
    """Ignore the errors of these numbers in a block."""
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise

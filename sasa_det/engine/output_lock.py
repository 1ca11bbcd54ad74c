"""One run at a time in an output folder."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from .errors import UsageError

__all__ = ["output_lock"]

logger = logging.getLogger(__name__)

# What a file system without locks answers.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_locks: set[int] = set()


def _close_in_child() -> None:
    # A forked process, as a data loader's, shares the lock of its parent, which would be held on
    # after the parent was killed.
    for lock in _locks:
        os.close(lock)
    _locks.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def output_lock(folder: str | os.PathLike) -> Iterator[None]:
    """Keep other runs out of a folder in a block.

    The lock is the kernel's, on a file ``.lock`` of the folder, and ends with the process that
    holds it, however that ends. On a file system without locks a warning says so.

    Args:
        folder: an output folder, which is made if it is not there.

    Raises:
        UsageError: if another run has the folder, naming it, or the folder cannot be written to.
    """
    path = Path(folder, ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UsageError(f"OUTPUT_DIR {folder} cannot be written to: {error.strerror}.") from error
    _locks.add(lock)
    try:
        _acquire(lock, folder)
        yield
    finally:
        # A forked process that comes here has closed it before.
        if lock in _locks:
            _locks.remove(lock)
            os.close(lock)


def _acquire(lock: int, folder: str | os.PathLike) -> None:
    try:
        # Not lockf, whose locks are lost when the process closes any descriptor of the file.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 200).decode(errors="replace")
        raise UsageError(
            f"OUTPUT_DIR {folder} is in use by another run ({holder}); wait for its end or name "
            "another OUTPUT_DIR."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "The file system of OUTPUT_DIR %s has no locks (%s): nothing keeps a second run out.",
            folder,
            error.strerror,
        )
    start = datetime.now().isoformat(" ", timespec="seconds")
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()} since {start}".encode())

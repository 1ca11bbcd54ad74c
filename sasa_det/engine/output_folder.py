"""Output folders: the lock, resuming and overwriting."""

import errno
import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from ..checkpoint.sources import locate
from ..config.changes import check_changes
from ..config.options import RunOptions
from ..errors import USAGE_ERRORS, UsageError
from .writers import WANDB_ID

logger = logging.getLogger(__name__)

# The errors of file systems without locks.
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
def output_lock(folder: str | os.PathLike, key: str = "OUTPUT_DIR") -> Iterator[None]:
    """Keep other runs out of a folder in a block.

    The lock is the kernel's, on a file ``.lock`` of the folder, and ends with the process that
    holds it, however that ends. On a file system without locks a warning says so.

    Args:
        folder: an output folder, which is made if it is not there.
        key: the key of the config that names it.

    Raises:
        UsageError: if another run has the folder, naming it, or the folder cannot be written to.
    """
    path = Path(folder, ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UsageError(f"{key} {folder} cannot be written to: {error.strerror}.") from error
    _locks.add(lock)
    try:
        _acquire(lock, folder, key)
        yield
    finally:
        # A forked process that comes here has closed it before.
        if lock in _locks:
            _locks.remove(lock)
            os.close(lock)


def _acquire(lock: int, folder: str | os.PathLike, key: str) -> None:
    try:
        # Not lockf, whose locks are lost when the process closes any descriptor of the file.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 200).decode(errors="replace")
        raise UsageError(
            f"{key} {folder} is in use by another run ({holder}); wait for its end or name another "
            f"{key}."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "The file system of %s %s has no locks (%s): nothing keeps a second run out.",
            *(key, folder, error.strerror),
        )
    start = datetime.now().isoformat(" ", timespec="seconds")
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()} since {start}".encode())


# The value of --resume: continue a run, continue it if there is a checkpoint, or start one.
Resume = Literal["always", "auto"] | None

# What evaluation writes into an output folder, and what training writes as well.
_RESULTS = ("inference/**/*.*",)

_RUN_FILES = (
    "config.yaml",
    "metrics.json",
    "last_checkpoint",
    "log.txt*",
    "model_*.pth",
    "events.out.tfevents.*",
    ".writing*",
    WANDB_ID,
    *_RESULTS,
)


@dataclass(frozen=True)
class OutputFolder:
    """The output folder of a run, which no other run has at the same time.

    Attributes:
        path: the folder.
        resumed: whether the run continues from a checkpoint in the folder.
        removable: files of an earlier run that ``--overwrite`` allows to remove.
        before: files of runs that were there before this one.
        is_new: whether the folder was made for this run.
    """

    path: Path
    resumed: bool
    removable: Sequence[Path] = ()
    before: Collection[Path] = ()
    is_new: bool = False

    def clear(self) -> None:
        """Remove what an earlier run left, as far as ``--overwrite`` allows."""
        for path in self.removable:
            path.unlink()

    def discard(self) -> None:
        """Remove what this run wrote before a mistake ended it, and the folder if it is new."""
        for path in _files(self.path, _RUN_FILES):
            if path not in self.before and path.suffix != ".pth":
                path.unlink()
        if self.is_new and [path.name for path in self.path.iterdir()] == [".lock"]:
            shutil.rmtree(self.path)


@contextmanager
def claim_output(
    options: RunOptions,
    *,
    eval_only: bool = False,
    resume: Resume = None,
    overwrite: bool = False,
    leader: bool = True,
) -> Iterator[OutputFolder]:
    """Lock the output folder of a run in a block, after checking that the run loses nothing in it.

    What the run wrote is removed again, and the folder if it was made for the run, if a mistake
    ends the block, or Ctrl-C before anything was saved.

    Args:
        options: of the run.
        eval_only: whether the run evaluates without training.
        resume: the value of ``--resume``.
        overwrite: whether files of an earlier run may be removed.
        leader: False in the other commands of a run of several commands, as one for each machine,
            which leave the folder to the first.

    Yields:
        OutputFolder: the folder, in which the caller has to call :meth:`OutputFolder.clear`.

    Raises:
        UsageError: if another run has the folder, it cannot be written to, or it holds a run that
            is neither resumed nor overwritten, no checkpoint that could be resumed, or a run that
            cannot be continued with this config.
    """
    folder = Path(options.output_dir)
    if not leader:
        yield OutputFolder(folder, is_resumed(options, resume))
        return
    key, is_new = options.key("output_dir"), not folder.exists()
    if not is_new and not folder.is_dir():
        raise UsageError(f"{key} {folder} is a file; it must be a folder.")
    with output_lock(folder, key):
        output = OutputFolder(folder, False, before=_files(folder, _RUN_FILES), is_new=is_new)
        try:
            resumed = is_resumed(options, resume)
            _check_output(options, resumed, eval_only=eval_only, resume=resume, overwrite=overwrite)
            removable = _removable(folder, eval_only) if overwrite else ()
            yield replace(output, resumed=resumed, removable=removable)
        except USAGE_ERRORS:
            output.discard()
            raise
        except KeyboardInterrupt:
            if not any(folder.glob("model_*.pth")):
                output.discard()
            raise


def _check_output(
    options: RunOptions, resumed: bool, *, eval_only: bool, resume: Resume, overwrite: bool
) -> None:
    folder, weights, key = Path(options.output_dir), options.weights, options.key("output_dir")
    if resume and not eval_only:
        if overwrite:
            raise UsageError("--resume and --overwrite exclude each other.")
        if resumed:
            check_changes(options)
        # Without a checkpoint, what is there is of the same run, stopped before its first one.
        return
    # Evaluation that takes the folder's weights adds its results to the run that made them.
    files = _files(folder, _RESULTS if resumed else _RUN_FILES)
    if files and not overwrite:
        another_way = "" if eval_only else "continue the run with --resume, "
        raise UsageError(
            f"{key} {folder} already holds {files[0].relative_to(folder)} of a run; name "
            f"another {key}, {another_way}or remove it with --overwrite."
        )
    removed = [path.resolve() for path in _removable(folder, eval_only)]
    if weights and locate(weights).path.resolve() in removed:
        raise UsageError(
            f"{options.key('weights')} {weights} would be removed by --overwrite; name another "
            f"{key}."
        )


def is_resumed(options: RunOptions, resume: Resume) -> bool:
    """Return whether a run continues from a checkpoint in its output folder.

    Args:
        options: of the run, whose output folder need not exist.
        resume: the value of ``--resume``.

    Raises:
        UsageError: if there is no checkpoint and a run must be resumed.
    """
    folder = Path(options.output_dir)
    found = any(path.is_file() for path in folder.glob("model_*.pth"))
    if resume == "always" and not found:
        raise UsageError(
            f"{options.key('output_dir')} {folder} holds no checkpoint to resume; with --resume "
            "auto a run begins where there is none."
        )
    return resume is not None and found


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file())


def _removable(folder: Path, eval_only: bool) -> list[Path]:
    """List what --overwrite removes: evaluation leaves the files of training alone."""
    files = _files(folder, _RESULTS if eval_only else _RUN_FILES)
    # It is written anew, and may be what the run is configured with.
    return [path for path in files if path != folder / "config.yaml"]

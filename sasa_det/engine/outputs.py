"""The files that commands write: refused before any work where they must not be written."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..command_line import refuse_existing
from ..errors import UsageError


def check_output_file(
    path: str | os.PathLike, *, overwrite: bool = False, inputs: Iterable[str | os.PathLike] = ()
) -> None:
    """Raise UsageError if a command must not or cannot write a file.

    Args:
        path: the file to write.
        overwrite: whether it may replace one.
        inputs: files that the command reads, none of which it may be.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"output {path} is a folder, and must be a file.")
    if os.path.lexists(path) and not overwrite:
        raise UsageError(f"output {path} exists already; name another one, or give --overwrite.")
    _check_inputs(path, [path], inputs)
    _check_writable(path)


def check_output_folder(
    folder: str | os.PathLike,
    names: Iterable[str] = (),
    *,
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike] = (),
) -> None:
    """Raise UsageError if a command must not or cannot write files into a folder.

    Args:
        folder: to write into.
        names: of the files that are known before, relative to the folder.
        overwrite: whether it may hold files, of which those of the same name are replaced.
        inputs: files that the command reads, none of which is written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output {folder} is a file, and must be a folder.")
    if not overwrite:
        refuse_existing(folder, hint=", or give --overwrite")
    _check_inputs(folder, [folder / name for name in names], inputs)
    _check_writable(folder)


@contextmanager
def explained(path: str | os.PathLike) -> Iterator[None]:
    """Turn what the operating system says in a block, as of a full disk, into a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"output {path} cannot be written: {error.strerror or error}.") from error


def _check_inputs(output: Path, paths: Iterable[Path], inputs: Iterable[str | os.PathLike]) -> None:
    read = {os.path.realpath(path) for path in inputs}
    for path in paths:
        if os.path.realpath(path) in read:
            raise UsageError(f"output {output} would replace {path}, which is an input.")


def _check_writable(path: Path) -> None:
    parent = Path(os.path.abspath(path))
    while not os.path.lexists(parent):
        parent = parent.parent
    if parent != Path(os.path.abspath(path)) and not parent.is_dir():
        raise UsageError(f"output {path} cannot be written: {parent} is not a folder.")
    folder = parent if parent.is_dir() else parent.parent
    if not os.access(folder, os.W_OK):
        raise UsageError(f"output {path} cannot be written: {folder} may not be written to.")

"""The lock of an output folder: one run at a time, and gone with the run however that ends."""

import errno
import fcntl
import multiprocessing
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from sasa_det.engine import UsageError
from sasa_det.engine.output_folder import output_lock


def hold(folder, pipe, with_child):
    """Take the lock in a process of its own, say so, and keep it until told to end."""
    with output_lock(folder):
        if with_child:
            multiprocessing.get_context("fork").Process(target=live, args=(pipe,)).start()
        else:
            pipe.send(os.getpid())
        pipe.recv()


def live(pipe):
    pipe.send(os.getpid())
    signal.pause()


@contextmanager
def holder(folder, with_child=False):
    """Another process that holds a folder's lock; yields it, the process that says so, a pipe."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(folder, theirs, with_child))
    process.start()
    # Open on the other side alone, so that its death is an end of file here.
    theirs.close()
    try:
        yield process, ours.recv(), ours
    finally:
        process.kill()
        process.join()


def is_free(folder):
    try:
        with output_lock(folder):
            return True
    except UsageError:
        return False


def test_a_second_run_is_refused_and_told_who_has_the_folder(tmp_path):
    folder = tmp_path / "run"
    with holder(folder) as (process, _, pipe):
        with pytest.raises(UsageError) as error:
            with output_lock(folder):
                pass
        message = str(error.value)
        assert message.startswith(f"OUTPUT_DIR {folder} is in use by another run (process ")
        assert f"process {process.pid} on {os.uname().nodename} since 20" in message
        pipe.send("end")
        process.join()
        assert process.exitcode == 0
        assert is_free(folder)


def test_the_same_process_is_a_second_run_too(tmp_path):
    with output_lock(tmp_path):
        assert not is_free(tmp_path)
        # Reading the file, as a copy of the folder would, does not lose the lock.
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        assert not is_free(tmp_path)
    assert is_free(tmp_path)


def test_the_lock_ends_with_an_exception(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with output_lock(tmp_path):
            1 / 0  # noqa: B018
    assert is_free(tmp_path)


def test_the_lock_of_a_killed_run_is_gone_though_its_children_live(tmp_path):
    with holder(tmp_path, with_child=True) as (process, child, _):
        try:
            assert not is_free(tmp_path)
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            os.kill(child, 0)  # it lives
            assert is_free(tmp_path)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_forked_process_that_leaves_the_block_closes_no_other_file(tmp_path):
    with output_lock(tmp_path):
        child = os.fork()
        if child:
            status = os.waitpid(child, 0)[1]
            assert not is_free(tmp_path)
        else:
            # It gets the number of the descriptor that a forked process does not have.
            other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    if not child:
        failed = 1
        try:
            os.write(other, b"kept")
            failed = 0
        finally:
            os._exit(failed)
    assert status == 0 and (tmp_path / "other").read_text() == "kept"


def test_a_lock_file_is_no_way_to_another_file(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("content")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(precious)
    with pytest.raises(UsageError, match="cannot be written to"):
        with output_lock(tmp_path / "run"):
            pass
    assert precious.read_text() == "content"


def test_folders_that_cannot_be_made_or_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/self/run")):
        with pytest.raises(UsageError, match=f"OUTPUT_DIR {folder} cannot be written to: "):
            with output_lock(folder):
                pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def answer(lock, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", answer)
    with output_lock(tmp_path):
        pass
    (record,) = caplog.records
    assert f"The file system of OUTPUT_DIR {tmp_path} has no locks" in record.getMessage()

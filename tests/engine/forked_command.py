"""Commands in processes of their own that need not import PyTorch and detectron2, which is seconds.

They are forked from a process that has done nothing but import what the commands do; what follows
is as where Python runs a script, with the signals and the output of a process.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import threading

_CONTEXT = multiprocessing.get_context("forkserver")


class ForkedCommand:
    """A script that runs with some arguments; what it writes, errors too, is in ``stdout``.

    It has the part of :class:`subprocess.Popen` that the tests need. The process leads a group.
    """

    def __init__(self, words, env):
        _CONTEXT.set_forkserver_preload(["sasa_det.engine"])
        reader, writer = _CONTEXT.Pipe(duplex=False)
        given = {"WORDS": words, "ENV": env, "OUTPUT": writer}
        # By its path, because the process cannot import a module of the tests.
        self._process = _CONTEXT.Process(target=runpy.run_path, args=(__file__, given, "forked"))
        self._process.start()
        writer.close()
        self.stdout = os.fdopen(os.dup(reader.fileno()), encoding="utf-8")
        reader.close()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self):
        self._process.join()
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=600):
        """Read until all that have inherited the output have ended; a timeout ends them."""
        timer = threading.Timer(timeout, os.killpg, (self.pid, signal.SIGKILL))
        timer.start()
        try:
            output = self.stdout.read()
        finally:
            timer.cancel()
        self.wait()
        return output, None


def _run(words, env, output):
    """Become the process of a script."""
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # Python's own, not that of this process
    os.environ.clear()
    os.environ.update(env)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(output.fileno(), descriptor)
        stream = open(descriptor, "w", buffering=1, encoding="utf-8", closefd=False)
        setattr(sys, name, stream)
    output.close()
    sys.argv = words
    sys.path.insert(0, os.path.dirname(words[0]))
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        # A process of multiprocessing does not end as others do.
        atexit._run_exitfuncs()


if __name__ == "forked":
    _run(WORDS, ENV, OUTPUT)  # noqa: F821

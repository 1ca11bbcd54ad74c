"""Launching the processes of a run: one, several on each machine, or torchrun's."""

import datetime
import gc
import hashlib
import logging
import os
import signal
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import multiprocessing

from ..utils.text import printable

logger = logging.getLogger(__name__)

_TIMEOUT = datetime.timedelta(minutes=30)
# The prefix of the address of a store in the launching process.
_LOCAL_STORE = "store://127.0.0.1:"

# The store through which the processes of the run exchange values.
_store: dist.Store | None = None


def started_by_torchrun() -> bool:
    """Tell whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_elastic_restart() -> bool:
    """Tell whether torchrun started this process anew after another one failed."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch(
    main: Callable[..., int],
    num_processes: int,
    *,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    device: str = "cuda",
    args: tuple = (),
) -> int:
    """Call a function in all processes of a run.

    detectron2's launch needs GPUs in release 0.6. This one runs on CPUs as well (gloo), joins the
    processes that torchrun started, and passes on signals and exit statuses.

    Args:
        main: called with ``args``; returns an exit status.
        num_processes: number of processes on this machine, unless torchrun started them.
        num_machines: number of machines.
        machine_rank: rank of this machine.
        dist_url: address at which the processes connect; "auto" for a free port of this machine,
            if there is only one machine.
        device: "cuda" or "cpu".
        args: for ``main``; picklable where there are several processes.

    Returns:
        int: the exit status of the process that failed first, or 0.
    """
    if started_by_torchrun():
        local = int(os.environ["LOCAL_RANK"])
        store, rank, world_size = next(dist.rendezvous("env://"))
        # The store of torchrun's agent still holds the addresses of an attempt that failed.
        store = dist.PrefixStore(f"attempt_{_restarts()}", store)
        _join_group(store, rank, world_size, local, int(os.environ["LOCAL_WORLD_SIZE"]), device)
        try:
            return main(*args)
        finally:
            _leave_group()
    world_size = num_processes * num_machines
    if world_size == 1:
        return main(*args)
    if dist_url == "auto":
        # Opened here, so that no other program can take the port before the processes connect.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        dist_url = f"{_LOCAL_STORE}{store.port}"
    first = machine_rank * num_processes
    context = multiprocessing.start_processes(
        _worker,
        (main, dist_url, world_size, first, num_processes, device, args),
        nprocs=num_processes,
        join=False,
        start_method="spawn",
    )
    return _wait(context)


def _wait(context: multiprocessing.ProcessContext) -> int:
    """Wait for the processes, and send them the signals that this process receives."""

    received = []

    def hand_on(number, frame):
        received.append(number)
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    # A terminal sends Ctrl-C to the processes as well, which count the two signals as one.
    handed = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, hand_on) for number in handed}
    try:
        while not context.join():
            pass
    except multiprocessing.ProcessExitedException as error:
        # A process that a signal ended has the signal's negative number.
        return error.exit_code if error.exit_code > 0 else 128 - error.exit_code
    except multiprocessing.ProcessRaisedException as error:
        if signal.SIGINT in received:
            return 128 + signal.SIGINT  # Ctrl-C before the training that would save
        print(printable(str(error), keep="\n\t"), file=sys.stderr)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _worker(
    local_rank: int,
    main: Callable[..., int],
    url: str,
    world_size: int,
    first: int,
    num_processes: int,
    device: str,
    args: tuple,
) -> None:
    # For the workers of data loaders: a spawned worker would import everything again.
    multiprocessing.set_start_method("fork", force=True)
    rank = first + local_rank
    if url.startswith(_LOCAL_STORE):
        port = int(url.removeprefix(_LOCAL_STORE))
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
    else:
        store, rank, world_size = next(dist.rendezvous(url, rank, world_size))
    _join_group(store, rank, world_size, local_rank, num_processes, device)
    try:
        status = main(*args)
    finally:
        _leave_group()
    # If a thread of a process group frees a tensor during finalization, the process aborts.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _join_group(
    store: dist.Store, rank: int, world_size: int, local_rank: int, num_local: int, device: str
) -> None:
    """Join the process group, whose processes connect through a store."""
    global _store
    _store = dist.PrefixStore("sasa_det", store)
    # Linux sends SIGTERM to this process when its launcher is killed, so that it saves and ends.
    # torch's own choice is SIGINT, which can arrive twice, and then ends the process at once.
    multiprocessing._prctl_pr_set_pdeathsig(signal.SIGTERM)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        timeout=_TIMEOUT,
        store=store,
        rank=rank,
        world_size=world_size,
    )
    _make_local_group(num_local)
    comm.synchronize()


def _leave_group() -> None:
    """Destroy the process groups before the interpreter ends."""
    global _store
    _store = None
    dist.destroy_process_group()
    # detectron2 refers to the groups; without these references their threads end here.
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    gc.collect()


def first_to_say(text: str) -> bool:
    """Return whether this is the first process of the run that calls this with the text."""
    if _store is None:
        return True
    try:
        return _store.add(hashlib.sha256(text.encode()).hexdigest(), 1) == 1
    except dist.DistError:
        return True  # the process that held the store has ended


def _make_local_group(num_local: int) -> None:
    """Create detectron2's process group of each machine."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(num_local)
        return
    # In release 0.6, this is a part of detectron2's launch().
    for first in range(0, dist.get_world_size(), num_local):
        group = dist.new_group(list(range(first, first + num_local)))
        if first <= dist.get_rank() < first + num_local:
            comm._LOCAL_PROCESS_GROUP = group

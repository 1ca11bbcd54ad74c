"""How long calls take on a GPU: CUDA graphs of many calls, timed by events on the GPU.

A graph starts its kernels without Python and the dispatcher, which take longer than short kernels.
Its calls go round copies of their tensors, so that none finds its tensors in the cache, where the
layers of a model would not find theirs.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Run = Callable[[], object]

_SECONDS_OF_GRAPH = 2e-3  # that a replay takes at least
_MOST_CALLS = 400  # of a graph
_MOST_COPIES = 100
_WARM_UPS = 3  # calls before a capture: they compile, choose algorithms and make workspaces


def num_copies(bytes_of_call: int, cache_bytes: int) -> int:
    """Return how many copies of a call's tensors go round.

    Between two uses of a copy, the others have more bytes than twice the cache.

    Args:
        bytes_of_call: of the tensors of one call.
        cache_bytes: of the GPU's L2 cache.
    """
    return min(1 + math.ceil(2 * cache_bytes / max(1, bytes_of_call)), _MOST_COPIES)


def num_calls(seconds_of_round: float, copies: int) -> int:
    """Return how many calls a graph has: whole rounds of the copies, long enough to be timed.

    Args:
        seconds_of_round: that one call of each copy takes.
        copies: number of copies.
    """
    rounds = math.ceil(_SECONDS_OF_GRAPH / max(seconds_of_round, 1e-9))
    return copies * max(1, min(rounds, _MOST_CALLS // copies))


def make_copies(
    make: Callable[[], Run], cache_bytes: int, allocated_bytes: Callable[[], int]
) -> list[Run]:
    """Make a call as often as its tensors must go round.

    Args:
        make: makes the tensors of a call, and returns the call.
        cache_bytes: of the GPU's L2 cache.
        allocated_bytes: returns the bytes of all tensors there are.
    """
    before = allocated_bytes()
    runs = [make()]
    copies = num_copies(allocated_bytes() - before, cache_bytes)
    return runs + [make() for _ in range(copies - 1)]


@dataclass(frozen=True)
class Calls:
    """A captured graph, how many calls are in it, and what holds their tensors.

    The graph knows the tensors by their addresses alone.
    """

    graph: torch.cuda.CUDAGraph
    count: int
    runs: Sequence[Run]


def capture(make: Callable[[], Run], rotate: bool = True) -> Calls:
    """Make a CUDA graph of calls.

    Args:
        make: makes the tensors of a call, and returns the call. The call must not wait for the GPU,
            and allocates nothing whose size depends on what is in tensors.
        rotate: whether calls go round copies; of a whole model there need be one.
    """
    cache = torch.cuda.get_device_properties().L2_cache_size if rotate else 0
    # One stream for all, as libraries keep handles and workspaces for each stream, and autograd
    # runs the backward pass of an operation in the stream of its forward pass.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        runs = make_copies(make, cache, torch.cuda.memory_allocated)
        for _ in range(_WARM_UPS):
            runs[0]()
        for run in runs[1:]:
            run()
    stream.synchronize()
    one_round = _capture(runs, len(runs), stream)
    times = time_rounds({"": one_round}, rounds=3)
    calls = num_calls(len(runs) * statistics.median(times[""]), len(runs))
    return one_round if calls == len(runs) else _capture(runs, calls, stream)


def _capture(runs: Sequence[Run], calls: int, stream: torch.cuda.Stream) -> Calls:
    graph = torch.cuda.CUDAGraph()
    # As long as results live, the graph gives their memory to no other call: results go round too.
    results = deque(maxlen=len(runs))
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            results.append(runs[i % len(runs)]())
    return Calls(graph, calls, runs)


def time_rounds(calls: Mapping[str, Calls], rounds: int) -> dict[str, list[float]]:
    """Time graphs side by side: every round replays each of them.

    Args:
        calls: name to what was captured.
        rounds: number of rounds.

    Returns:
        dict[str, list[float]]: name to the seconds of a call in each round.
    """
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {x: [] for x in calls}
    for _ in range(rounds):
        for name, each in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # The first replay keeps the GPU busy until what is timed has been queued behind it.
            each.graph.replay()
            start.record()
            each.graph.replay()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: [1e-3 * start.elapsed_time(end) / calls[name].count for start, end in pairs]
        for name, pairs in events.items()
    }


def time_calls(
    makes: Mapping[str, Callable[[], Run]], rounds: int, rotate: bool = True
) -> tuple[dict[str, float], dict[str, str]]:
    """Time calls side by side as CUDA graphs, and let go of their memory.

    Args:
        makes: name to what makes a call, see :func:`capture`.
        rounds: number of rounds.
        rotate: see :func:`capture`.

    Returns:
        (seconds, problems): name to the median time of a call, and to why there is none.
    """
    calls, problems = {}, {}
    for name, make in makes.items():
        try:
            calls[name] = capture(make, rotate)
        except Exception as error:  # of whatever library it calls
            problems[name] = describe_error(error)
    try:
        medians = {name: statistics.median(x) for name, x in time_rounds(calls, rounds).items()}
    except RuntimeError as error:  # of a kernel in one of the graphs
        medians, problems = {}, {name: describe_error(error) for name in calls} | problems
    calls.clear()
    torch.cuda.empty_cache()
    return medians, problems


def describe_error(error: BaseException) -> str:
    """Return an error's first line: that of the first error, where others followed from it."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")

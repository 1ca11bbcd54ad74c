"""The plan of measurements on a GPU: how many copies and calls there are."""

import pytest
import torch

from sasa_det.layers import LocalSelfAttention2d
from sasa_det.ops.gpu_timing import capture, describe_error, make_copies, num_calls, num_copies

MIB = 1 << 20


@pytest.mark.parametrize("size,copies", [(200, 2), (100, 2), (26, 5), (1, 101), (0, 101)])
def test_copies_of_a_call_push_each_other_out_of_the_cache(size, copies):
    found = num_copies(size * MIB, 50 * MIB)
    assert found == min(copies, 100)
    if size:
        # What is used between two uses of a copy is twice the cache, unless they would be too many.
        assert (found - 1) * size >= 100 or found == 100
        assert (found - 2) * size < 100


def test_a_graph_is_long_enough_to_be_timed_and_has_whole_rounds():
    assert num_calls(10e-3, 4) == 4
    assert num_calls(0.5e-3, 4) == 16
    assert num_calls(0.51e-3, 4) == 16
    assert num_calls(1e-9, 4) == 400
    assert num_calls(0.0, 7) == 399
    assert num_calls(1e-9, 1000) == 1000


def test_calls_are_made_until_they_fill_the_cache_twice():
    made = []

    def make():
        made.append(len(made))
        return lambda number=made[-1]: number

    runs = make_copies(make, cache_bytes=50, allocated_bytes=lambda: 7 + 30 * len(made))
    assert [run() for run in runs] == made == [0, 1, 2, 3, 4]
    made.clear()
    assert len(make_copies(make, 0, lambda: 30 * len(made))) == 1


def test_the_first_error_is_told_and_not_what_it_did_to_a_capture():
    try:
        try:
            raise ValueError("it takes no such sizes\nMore")
        finally:
            raise RuntimeError("the capture was invalidated")
    except RuntimeError as error:
        assert describe_error(error) == "ValueError: it takes no such sizes"
    assert describe_error(RuntimeError("")) == "RuntimeError"


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@needs_gpu
def test_a_replay_makes_every_call_once():
    counters = []

    def make():
        counters.append(torch.zeros(1 << 20, device="cuda"))
        return lambda x=counters[-1]: x.add_(1)

    calls = capture(make)
    before = sum(int(x[0]) for x in counters)
    calls.graph.replay()
    torch.cuda.synchronize()
    assert sum(int(x[0]) for x in counters) == before + calls.count
    cache = torch.cuda.get_device_properties().L2_cache_size
    assert sum(x.nbytes for x in counters) > 2 * cache or len(counters) == 100


@needs_gpu
def test_a_step_in_a_graph_has_the_gradients_of_one_outside():
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(64, 64).to("cuda", torch.bfloat16)
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(2, 64, 19, 21, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn_like(x)
    kept = []

    def make():
        def run():
            kept[:] = torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)

        return run

    calls = capture(make, rotate=False)
    calls.graph.replay()
    expected = torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))

"""Memory of results: used again when no tensor uses it any more, and never before."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sasa_det.ops import cpu

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=str(cpu.MISSING))


def _add(x):
    return torch.ops.sasa_det_cpu.add(x, [], None, [], False, "")


def _copy_of(number, *, floats=64 << 10):
    return _add(torch.full((1, 4, floats // 4 // 64, 64), float(number)))


def test_memory_is_used_again():
    first = _copy_of(1)
    address = first.data_ptr()
    del first
    second = _copy_of(2)
    assert second.data_ptr() == address
    assert (second == 2).all()


def test_a_view_keeps_its_memory():
    first = _copy_of(1)
    view = first[0, 3, 5]
    address = first.data_ptr()
    del first
    assert _copy_of(2).data_ptr() != address
    assert (view == 1).all()


def test_results_that_are_alive_share_nothing():
    for _ in range(3):
        results = [_copy_of(number) for number in range(20)]
        for number, result in enumerate(results):
            assert (result == number).all()
            result += 100
        assert [result.min().item() for result in results] == [100 + n for n in range(20)]


def test_a_much_smaller_result_does_not_take_a_large_block():
    first = _copy_of(1, floats=256 << 10)
    address = first.data_ptr()
    del first
    assert _copy_of(2, floats=128 << 10).data_ptr() != address


def test_threads_share_the_memory():
    def work(thread):
        for step in range(200):
            result = _copy_of(thread * 1000 + step, floats=(16 + 8 * (step % 5)) << 10)
            assert (result == thread * 1000 + step).all()
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_what_is_kept_is_limited():
    """Blocks beyond 64 MiB go back to the system, the oldest first."""
    results = [_copy_of(number, floats=1 << 20) for number in range(40)]  # 4 MiB each
    addresses = [result.data_ptr() for result in results]
    while results:
        results.pop(0)
    again = [_copy_of(number, floats=1 << 20) for number in range(16)]
    assert {result.data_ptr() for result in again} == set(addresses[-16:])

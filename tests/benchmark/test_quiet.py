"""The signs of a machine that is not quiet."""

import os
import subprocess
import sys
import time

import pytest

from sasa_det.benchmark import quiet
from sasa_det.benchmark.measure import Result, relative_spread
from sasa_det.benchmark.quiet import Watch, describe_quiet, is_disturbed

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/stat")

BUSY = """
import sys, time
while time.process_time() < 0.5:
    pass
print("done", flush=True)
sys.stdin.read()
"""


@linux
def test_another_process_is_seen():
    watch = Watch()
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as busy:
        assert busy.stdout.readline() == "done\n"
        seconds = watch.others() * (time.perf_counter() - watch._start)
        busy.stdin.close()
    # Half a second of the other, less what ticks leave unsure; more where there is other work.
    assert seconds > 0.4


@linux
def test_own_work_and_processors_of_others_do_not_count(monkeypatch, tmp_path):
    tick = os.sysconf("SC_CLK_TCK")
    stat, clock = tmp_path / "stat", [100.0]
    monkeypatch.setattr(quiet, "_STAT", stat)
    monkeypatch.setattr(quiet.os, "sched_getaffinity", lambda _: {1}, raising=False)
    monkeypatch.setattr(quiet.time, "perf_counter", lambda: clock[0])
    own = [0.0, 0.0]
    monkeypatch.setattr(quiet.os, "times", lambda: (*own, 0.0, 0.0, clock[0]))

    def write(user, idle, steal):
        busy_elsewhere = f"cpu0 {user * 99} 0 0 0 0 0 0 0 0 0"
        mine = f"cpu1 {user * tick} 0 0 {idle * tick} {idle} 0 0 {steal * tick} 0 0"
        stat.write_text(f"cpu 1 2 3 4 5 6 7 8 9 10\n{busy_elsewhere}\n{mine}\nintr 12 3\n")

    write(user=50, idle=7, steal=2)
    watch = Watch()
    # Four seconds of work of its own, two of others and one taken by the host in ten seconds.
    clock[0], own[:] = 110.0, (3.0, 1.0)
    write(user=56, idle=70, steal=3)
    assert watch.others() == pytest.approx((2 + 1 - 2 / tick) / 10)
    # Its own alone.
    watch = Watch()
    clock[0], own[:] = 120.0, (13.0, 1.0)
    write(user=66, idle=70, steal=3)
    assert watch.others() == 0
    stat.unlink()
    assert watch.others() is None and Watch().others() is None


def test_spread_is_the_interquartile_range_over_the_median():
    assert relative_spread([3.0]) == 0
    assert relative_spread([4.0, 1.0, 3.0, 2.0, 5.0]) == pytest.approx((4 - 2) / 3)
    # One slow call in many is no spread.
    assert relative_spread([1.0] * 9 + [50.0]) == 0


def _result(**measured):
    return Result("case", "way", "way", seconds=1.0, **measured)


def test_what_is_said():
    calm = _result(spread=0.04, others=0.02)
    spread, crowded = _result(spread=0.2, others=0.0), _result(spread=0.0, others=0.7)
    assert [is_disturbed(result) for result in (calm, spread, crowded)] == [False, True, True]
    assert not is_disturbed(Result("case", "way", "way", why_not="not installed"))
    told = describe_quiet(0.1, [calm])
    assert told.startswith("The machine was quiet: load before the start 0.1")
    assert "up to 4%" in told and "up to 0.02" in told
    told = describe_quiet(0.1, [calm, spread, crowded])
    assert told.startswith("The machine was NOT quiet, 2 of 3 rows have a *")
    assert describe_quiet(2.0, [calm]).startswith("The machine was NOT quiet, 0 of 1")
    assert "others kept busy not known" in describe_quiet(0.0, [_result(spread=0.0)])

"""The check of the CUDA kernels in a process of its own, which may end in any way."""

import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from sasa_det.ops import cpu, cuda_check
from sasa_det.ops.cuda_check import Verdict, in_other_process, keep_verdict, why_not_correct
from sasa_det.ops.cuda_compiler import CompilerError
from sasa_det.ops.cuda_kernels import KERNELS, Split, Variant

VARIANTS = [Variant(torch.bfloat16, 32, 7), Variant(torch.float16, 8, 5, mask=False)]
GPU = torch.device("cuda:0")


def process(code):
    """A process that says that it begins, as the real one does, and then runs ``code``."""
    begin = f"import json, os, sys; say = lambda x: print({cuda_check._MARK!r} + x, flush=True)"
    return [sys.executable, "-c", f"{begin}; say('begins'); {code}"]


def verdict_line(**facts):
    return f"say({json.dumps(facts)!r})"


def test_variants_reach_the_process_and_verdicts_come_back():
    # Its verdict is what it was given.
    code = (
        "say(json.dumps({'errors': {x['dtype']: x['head_width'] for x in json.load(sys.stdin)}}))"
    )
    (verdict,) = in_other_process(process(code), VARIANTS)[:1]
    assert verdict == Verdict({"bfloat16": 32, "float16": 8})


def test_a_process_that_crashes_is_a_problem_of_its_variant():
    first = verdict_line(errors={"output": 0.001})
    verdicts = in_other_process(process(f"{first}; os.abort()"), VARIANTS)
    problem = "the process that compared them was ended by SIGABRT"
    assert verdicts == [Verdict({"output": 0.001}), Verdict({}, problem)]


def test_a_process_that_stops_after_a_problem_has_said_enough():
    line = verdict_line(errors={}, problem="CUDA error: an illegal memory access was encountered")
    verdicts = in_other_process(process(f"{line}; sys.exit(1)"), VARIANTS)
    assert verdicts == [Verdict({}, "CUDA error: an illegal memory access was encountered")]


def test_a_process_that_does_not_end_is_ended():
    limits = {"seconds_to_start": 2, "seconds_of_variant": 0}
    (verdict,) = in_other_process(process("import signal; signal.pause()"), VARIANTS[:1], **limits)
    assert verdict.problem == "the process that compared them took more than 2 s"


@pytest.mark.parametrize("command", [None, ["/nowhere/python"], [sys.executable, "-c", "1 / 0"]])
def test_a_process_that_does_not_begin_has_no_verdict(command):
    assert in_other_process(command, VARIANTS) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_real_process_lacks_nothing_but_a_gpu():
    command = cuda_check._command(GPU)
    done = subprocess.run(command, input="[]", capture_output=True, text=True, check=False)
    assert not done.stdout
    assert "cuda_check.py" in done.stderr and "NVIDIA driver" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_real_process_compares_the_kernels():
    verdicts = cuda_check.check(VARIANTS, GPU)
    assert [verdict.problem for verdict in verdicts] == [None, None]
    names = {*cuda_check.RESULTS, *(() if cpu.MISSING else (cuda_check.LAYER,))}
    assert all(set(verdict.errors) == names for verdict in verdicts)


@pytest.mark.skipif(bool(cpu.MISSING), reason=str(cpu.MISSING))
def test_a_verdict_is_of_a_build_of_the_extension(tmp_path, monkeypatch):
    file = tmp_path / "extension.so"
    file.write_bytes(b"built")
    os.utime(file, ns=(10**18, 10**18))
    monkeypatch.setattr(cpu, "EXTENSION", SimpleNamespace(__file__=str(file)))
    before = cuda_check._extension_facts()
    os.utime(file, ns=(2 * 10**18, 10**18))  # as when it is read
    assert cuda_check._extension_facts() == before
    os.utime(file, ns=(2 * 10**18, 2 * 10**18))
    assert cuda_check._extension_facts() != before


@pytest.mark.parametrize("split", [None, Split(1, 2)])
def test_a_variant_reaches_the_process_as_it_is(split):
    variant = Variant(torch.float16, 16, 5, mask=False, split=split)
    facts = json.loads(json.dumps(cuda_check._as_json(variant)))
    read = cuda_check._from_json(facts)
    assert read == variant
    assert all(
        read.split_of(kernel).threads == variant.split_of(kernel).threads for kernel in KERNELS
    )


def test_a_verdict_is_kept(tmp_path):
    path = tmp_path / "checks" / "x.json"
    kept = Verdict({"output": 0.01}, "output differs")
    assert keep_verdict(path, lambda: kept) == kept
    assert keep_verdict(path, pytest.fail) == kept
    other = Verdict({"output": 0.001})
    assert keep_verdict(path, lambda: other, again=True) == other
    assert keep_verdict(path, pytest.fail) == other


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"errors": {}, "more": 1}', "null"])
def test_a_damaged_verdict_is_made_again(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    verdict = Verdict({"output": 0.01})
    assert keep_verdict(path, lambda: verdict) == verdict
    assert keep_verdict(path, pytest.fail) == verdict


def test_a_want_of_time_or_memory_is_kept_for_this_run_alone(tmp_path):
    path = tmp_path / "x.json"
    late = Verdict({}, "it took more than 180 s", transient=True)
    assert keep_verdict(path, lambda: late) == late
    # The other processes of a training need not wait for it again, later ones try.
    assert keep_verdict(path, pytest.fail) == late
    before = cuda_check._BEGINNING - 1
    os.utime(path, (before, before))
    verdict = Verdict({"output": 0.01})
    assert keep_verdict(path, lambda: verdict) == verdict


@pytest.mark.parametrize(
    "code,transient",
    [("os.kill(os.getpid(), 9)", True), ("os.abort()", False), ("sys.exit(3)", False)],
)
def test_the_end_of_a_process_may_be_want_of_memory(code, transient):
    (verdict,) = in_other_process(process(code), VARIANTS[:1])
    assert verdict.transient == transient and verdict.problem


def test_errors_of_the_gpu_are_problems_and_end_no_forward_pass(caplog):
    for error, transient in (
        (torch.cuda.OutOfMemoryError("CUDA out of memory.\nMore lines"), True),
        (RuntimeError('Function "cuLaunchKernelEx" not found'), False),
        (CompilerError("it cannot be compiled"), False),
    ):

        def errors(error=error):
            raise error

        caplog.clear()
        problem = cuda_check.first_use_problem("A layer", errors, 0.1, "theirs")
        assert problem == str(error).partition("\n")[0]
        assert f"A layer does not use its CUDA kernels: {problem.rstrip('.')}." in caplog.text
        assert cuda_check._verdict_of_error(error).transient == transient


def test_a_check_has_no_more_time_than_it_is_given():
    first, second = cuda_check.check(VARIANTS, GPU, seconds=0)
    assert first == second == Verdict({}, "there was no time to check it", transient=True)
    (verdict,) = in_other_process(
        process("import signal; signal.pause()"), VARIANTS[:1], most_seconds=1
    )
    assert verdict.problem == "the process that compared them took more than 1 s"
    assert verdict.transient


def test_a_problem_that_leaves_the_gpu_as_it_was_does_not_end_the_process(monkeypatch, capsys):
    """One of the driver, which is not there."""
    variants = json.dumps([cuda_check._as_json(variant) for variant in VARIANTS])
    monkeypatch.setattr("sys.argv", ["check", "cpu"])
    monkeypatch.setattr("sys.stdin", io.StringIO(variants))
    cuda_check.main()
    _, *lines = capsys.readouterr().out.splitlines()
    verdicts = [json.loads(line.removeprefix(cuda_check._MARK)) for line in lines]
    assert len(verdicts) == len(VARIANTS) and all(x["problem"] for x in verdicts)


def test_where_nothing_can_be_kept_it_says_so(tmp_path, caplog):
    (tmp_path / "file").touch()
    verdict = Verdict({})
    assert keep_verdict(tmp_path / "file" / "x.json", lambda: verdict) == verdict
    assert "cannot be kept" in caplog.text


@pytest.fixture
def checks(monkeypatch, tmp_path):
    """The variants that were checked, of a GPU that is not there; heads of 8 channels fail."""
    checked = []

    def check(variants, device):
        checked.extend(variants)
        return [Verdict({}, "it is wrong." if x.head_width == 8 else None) for x in variants]

    monkeypatch.setattr(cuda_check, "check", check)
    monkeypatch.setattr(cuda_check, "_verdicts", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cuda_check, "_facts_digest", lambda device, variant: str(variant))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(cuda_check.CHECK_VARIABLE, raising=False)
    return checked


def test_a_variant_is_checked_once_for_all_processes(checks, monkeypatch, caplog):
    good, bad = VARIANTS
    for _ in range(2):
        assert why_not_correct(GPU, good) is None
        assert why_not_correct(GPU, bad) == "it is wrong."
    (record,) = caplog.records
    assert record.getMessage() == (
        "local_attention does not use its CUDA kernels for torch.float16, heads of 8 channels and "
        "kernel_size 5: it is wrong. SASA_DET_SELF_CHECK=1 checks them again."
    )
    monkeypatch.setattr(cuda_check, "_verdicts", {})  # as in another process
    assert why_not_correct(GPU, bad) == "it is wrong."
    assert checks == VARIANTS


def test_the_environment_variable_forces_and_skips_the_check(checks, monkeypatch):
    monkeypatch.setenv(cuda_check.CHECK_VARIABLE, "0")
    assert why_not_correct(GPU, VARIANTS[1]) is None and not checks
    monkeypatch.delenv(cuda_check.CHECK_VARIABLE)
    assert why_not_correct(GPU, VARIANTS[1]) == "it is wrong."
    monkeypatch.setenv(cuda_check.CHECK_VARIABLE, "1")
    monkeypatch.setattr(cuda_check, "_verdicts", {})
    for _ in range(2):
        assert why_not_correct(GPU, VARIANTS[1]) == "it is wrong."
    assert checks == [VARIANTS[1]] * 2
    monkeypatch.setenv(cuda_check.CHECK_VARIABLE, "yes")
    with pytest.raises(ValueError, match="^SASA_DET_SELF_CHECK must be 0 or 1, got 'yes'.$"):
        why_not_correct(GPU, VARIANTS[0])


def test_a_check_is_made_once_and_not_while_a_graph_is_captured(monkeypatch):
    made, capturing = [], [True]
    monkeypatch.setattr(cuda_check, "_problems", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])

    def check():
        made.append(1)
        return "it is wrong"

    def ask():
        return cuda_check.problem_of(("kernels", 1), check)

    assert ask() is None and not made
    capturing[0] = False
    assert ask() == ask() == "it is wrong" and len(made) == 1
    capturing[0] = True
    assert ask() == "it is wrong"
    monkeypatch.setenv("SASA_DET_SELF_CHECK", "0")
    assert ask() is None


def test_a_check_leaves_no_trace_in_what_surrounds_it(monkeypatch):
    def errors():
        x = torch.ones(2, requires_grad=True)
        (x * x).sum().backward()
        return {"output": float((x.grad - 2).abs().max())}

    def first_use(x):
        if not used:
            used.append(cuda_check.first_use_problem("A layer", errors, 0.1, "theirs"))
        return x.sin()

    used = []
    with torch.inference_mode():
        first_use(torch.ones(2))
    x = torch.ones(2, requires_grad=True)
    used.clear()
    torch.utils.checkpoint.checkpoint(first_use, x, use_reentrant=False).sum().backward()
    assert used == [None] and torch.equal(x.grad, x.cos())

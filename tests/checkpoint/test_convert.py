import functools
import hashlib
import os
import pickle
import runpy
import signal
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from sasa_det.checkpoint import (
    CheckpointError,
    convert_checkpoint,
    read_checkpoint,
    write_checkpoint,
    writing,
)
from sasa_det.checkpoint.sources import locate
from sasa_det.errors import UsageError
from sasa_det.model_zoo import get_checkpoint_url

TOOL = "tools/convert_checkpoint.py"

convert = functools.partial(convert_checkpoint, whole=True)


@pytest.fixture
def expected(state):
    """What remains of a training state."""
    digest = hashlib.sha256(state["config"].encode()).hexdigest()
    return {"model": state["model"], "config": state["config"], "config_digest": digest}


@pytest.fixture
def source(tmp_path, state):
    write_checkpoint(state, tmp_path / "model_final.pth")
    return tmp_path / "model_final.pth"


def test_the_weights_alone_are_kept_bit_for_bit(source, tmp_path, expected, assert_same):
    before = source.read_bytes()
    target = tmp_path / "new" / "weights.pth"
    convert(source, target)
    assert_same(read_checkpoint(target), expected)
    assert source.read_bytes() == before
    # A second time, and of the result.
    convert(source, tmp_path / "again.pth")
    convert(target, tmp_path / "twice.pth")
    assert target.read_bytes() == (tmp_path / "again.pth").read_bytes()
    assert_same(read_checkpoint(tmp_path / "twice.pth"), expected)


def test_parts_of_larger_tensors_are_cut_out(tmp_path):
    whole = torch.arange(10**6, dtype=torch.float32)
    torch.save({"model": {"a": whole[5:8], "b": whole[::2][:4]}}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.pth")
    weights = read_checkpoint(tmp_path / "b.pth")["model"]
    assert weights["a"].tolist() == [5, 6, 7] and weights["b"].tolist() == [0, 2, 4, 6]
    assert (tmp_path / "b.pth").stat().st_size < 10_000


def test_what_names_need_is_kept(tmp_path, assert_same):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"conv1_w": np.ones((2, 2), "f4")}))
    convert(tmp_path / "a.pkl", tmp_path / "b.pth")
    assert_same(read_checkpoint(tmp_path / "b.pth"), read_checkpoint(tmp_path / "a.pkl"))


def test_the_target(source, tmp_path, state, expected, assert_same):
    target = tmp_path / "weights.pth"
    target.write_text("other")
    with pytest.raises(CheckpointError, match="weights.pth exists; .*--overwrite"):
        convert(source, target)
    assert target.read_text() == "other"
    convert(source, target, overwrite=True)
    assert_same(read_checkpoint(target), expected)
    (tmp_path / "link.pth").symlink_to(source)
    os.link(source, tmp_path / "hard.pth")
    for same in (source, f"{tmp_path}/../{tmp_path.name}/model_final.pth", tmp_path / "link.pth"):
        with pytest.raises(CheckpointError, match="is the source"):
            convert(source, same, overwrite=True)
    with pytest.raises(CheckpointError, match="is the source"):
        convert(source, tmp_path / "hard.pth", overwrite=True)
    with pytest.raises(CheckpointError, match="must end in .pth or .safetensors"):
        convert(source, tmp_path / "weights.pkl")
    assert_same(read_checkpoint(source), state)


def test_published_weights_are_named_by_their_config(tmp_path):
    convert("Digits/retinanet_SASA.yaml", tmp_path / "weights.pth")
    published = read_checkpoint(locate(get_checkpoint_url("Digits/retinanet_SASA.yaml")).path)
    converted = read_checkpoint(tmp_path / "weights.pth")["model"]
    assert converted.keys() == published["model"].keys()
    assert all(torch.equal(converted[name], x) for name, x in published["model"].items())
    with pytest.raises(UsageError, match="no trained weights of Digits/other.yaml"):
        convert("Digits/other.yaml", tmp_path / "other.pth")


def test_sources_that_are_refused(tmp_path, hostile, state):
    torch.save(hostile, tmp_path / "hostile.pth")
    (tmp_path / "hostile.pkl").write_bytes(pickle.dumps(hostile))
    write_checkpoint(state, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-1])
    torch.save({"model": {"a": torch.tensor([1.0, float("nan")])}}, tmp_path / "nan.pth")
    for name in ("hostile.pth", "hostile.pkl", "cut.pth", "nan.pth", "missing.pth"):
        with pytest.raises(CheckpointError, match=name):
            convert(tmp_path / name, tmp_path / "target.pth")
    assert not (tmp_path / "target.pth").exists()


def test_another_process_writes_the_same_bytes(source, tmp_path):
    script = (
        "import sys, sasa_det.checkpoint as c\n"
        "for target in sys.argv[2:]:\n"
        "    c.convert_checkpoint(sys.argv[1], target, whole=True)"
    )
    names = ("a.pth", "a.safetensors")
    command = [sys.executable, "-W", "ignore", "-c", script, source, *(tmp_path / n for n in names)]
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "7"}, check=True)
    for name in names:
        other = tmp_path / f"b{name}"
        convert(source, other)
        assert (tmp_path / name).read_bytes() == other.read_bytes()


def test_safetensors(source, tmp_path, state, expected, assert_same):
    target = tmp_path / "a.safetensors"
    convert(source, target)
    assert_same(read_checkpoint(target), expected)
    for key, weight in safetensors.torch.load_file(target).items():
        assert_same(weight, state["model"][key])
    convert(target, tmp_path / "back.pth")
    convert(source, tmp_path / "straight.pth")
    assert (tmp_path / "back.pth").read_bytes() == (tmp_path / "straight.pth").read_bytes()


def test_averages_take_the_place_of_the_weights_that_were_averaged(
    tmp_path, state, expected, assert_same
):
    raw = {**state["model"], "norm.running_mean": torch.randn(5)}
    averages = {"backbone.weight": torch.randn(3, 4), "head.bias": torch.randn(5).half()}
    ema = {"decay": 0.5, "weights": averages}
    write_checkpoint({**state, "model": raw, "ema": ema}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "raw.pth")
    convert(tmp_path / "a.pth", tmp_path / "ema.pth", weights="ema")
    assert_same(read_checkpoint(tmp_path / "raw.pth"), {**expected, "model": raw})
    assert_same(read_checkpoint(tmp_path / "ema.pth"), {**expected, "model": {**raw, **averages}})


@pytest.mark.parametrize(
    ("ema", "message"),
    [
        (None, "holds no averaged weights"),
        ({"decay": 0.5, "weights": {}}, "holds no averaged weights"),
        (torch.ones(1), "holds no averaged weights"),
        ({"weights": {"other": torch.ones(1)}}, "averaged weight other is not one of its"),
        ({"weights": {"head.bias": torch.ones(1)}}, "averaged weight head.bias is not one of its"),
        ({"weights": {"head.bias": 1}}, "averaged weight head.bias is not one of its"),
        ({"weights": {"head.bias": torch.full((5,), torch.nan)}}, "head.bias is not finite"),
    ],
)
def test_averages_that_are_not_there(tmp_path, state, ema, message):
    torch.save({**state, **({} if ema is None else {"ema": ema})}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=f"a.pth.*{message}"):
        convert(tmp_path / "a.pth", tmp_path / "b.pth", weights="ema")
    assert os.listdir(tmp_path) == ["a.pth"]


def convert_and_be_killed(source, target, module, function):
    """Convert in a child, which is killed where it calls a function of a module."""
    child = os.fork()
    if child == 0:
        try:
            setattr(module, function, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
            convert(source, target)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


# Replacing the target is the last step of writing it, appending the checksum the one before that.
@pytest.mark.parametrize(
    ("suffix", "moment"), [(".pth", (writing, "append_sha256")), (".safetensors", (os, "replace"))]
)
def test_a_conversion_that_is_killed_leaves_nothing(source, tmp_path, state, suffix, moment):
    before, target = source.read_bytes(), tmp_path / "new" / f"a{suffix}"
    convert_and_be_killed(source, target, *moment)
    assert source.read_bytes() == before and not target.exists()
    convert(source, target)
    assert os.listdir(target.parent) == [target.name]
    assert read_checkpoint(target)["model"].keys() == state["model"].keys()


def run_tool(monkeypatch, *words):
    """Run the command and return its exit status."""
    monkeypatch.setattr(sys, "argv", [TOOL, *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(TOOL, run_name="__main__")
    return end.value.code


def test_the_command(source, tmp_path, monkeypatch, capsys):
    assert run_tool(monkeypatch, "--whole", source, tmp_path / "a.pth") == 0
    report = convert(source, tmp_path / "b.pth")
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    assert read_checkpoint(tmp_path / "a.pth")["config"] == read_checkpoint(source)["config"]
    assert capsys.readouterr() == (f"{report}\n", "")
    assert report.loaded == {"backbone.weight": "backbone.weight", "head.bias": "head.bias"}
    assert list(report.dropped) == ["trainer", "iteration"]


def test_the_command_tells_a_mistake_in_one_sentence(tmp_path, hostile, monkeypatch, capsys):
    torch.save(hostile, tmp_path / "a.pth")
    assert run_tool(monkeypatch, tmp_path / "a.pth", tmp_path / "b.pth") == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert "posix.system" in output.err
    assert os.listdir(tmp_path) == ["a.pth"]

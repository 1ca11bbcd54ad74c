import os
import pickle
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch

from sasa_det.checkpoint import CheckpointError, convert, read_checkpoint, write_checkpoint

TOOL = "tools/convert_checkpoint.py"


@pytest.fixture
def source(tmp_path, state):
    write_checkpoint(state, tmp_path / "model_final.pth")
    return tmp_path / "model_final.pth"


def test_the_weights_alone_are_kept_bit_for_bit(source, tmp_path, state, assert_same):
    before = source.read_bytes()
    target = tmp_path / "new" / "weights.pth"
    convert(source, target)
    assert_same(read_checkpoint(target), {"model": state["model"]})
    assert source.read_bytes() == before
    # A second time, and of the result.
    convert(source, tmp_path / "again.pth")
    convert(target, tmp_path / "twice.pth")
    assert target.read_bytes() == (tmp_path / "again.pth").read_bytes()
    assert_same(read_checkpoint(tmp_path / "twice.pth"), {"model": state["model"]})


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


def test_the_target(source, tmp_path, state, assert_same):
    target = tmp_path / "weights.pth"
    target.write_text("other")
    with pytest.raises(CheckpointError, match="weights.pth exists; .*--overwrite"):
        convert(source, target)
    assert target.read_text() == "other"
    convert(source, target, overwrite=True)
    assert_same(read_checkpoint(target), {"model": state["model"]})
    (tmp_path / "link.pth").symlink_to(source)
    os.link(source, tmp_path / "hard.pth")
    for same in (source, f"{tmp_path}/../{tmp_path.name}/model_final.pth", tmp_path / "link.pth"):
        with pytest.raises(CheckpointError, match="is the source"):
            convert(source, same, overwrite=True)
    with pytest.raises(CheckpointError, match="is the source"):
        convert(source, tmp_path / "hard.pth", overwrite=True)
    with pytest.raises(CheckpointError, match="must end in .pth"):
        convert(source, tmp_path / "weights.pkl")
    assert_same(read_checkpoint(source), state)


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


def test_the_command(source, tmp_path):
    # Another process, whose hashes differ, writes the same bytes.
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, TOOL, source, tmp_path / "a.pth"]
    output = subprocess.check_output(command, stderr=subprocess.STDOUT, env=environment)
    convert(source, tmp_path / "b.pth")
    assert output == b""
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_the_command_tells_a_mistake_in_one_sentence(tmp_path, hostile, monkeypatch, capsys):
    torch.save(hostile, tmp_path / "a.pth")
    monkeypatch.setattr(sys, "argv", [TOOL, str(tmp_path / "a.pth"), str(tmp_path / "b.pth")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(TOOL, run_name="__main__")
    output = capsys.readouterr()
    assert end.value.code == 2 and output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert "posix.system" in output.err
    assert os.listdir(tmp_path) == ["a.pth"]

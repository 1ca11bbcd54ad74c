import json
import os
import resource

import pytest
import safetensors.torch
import torch

from sasa_det.checkpoint import Checkpointer, CheckpointError, read_checkpoint, write_checkpoint

FACTS = {"matching_heuristics": True, "config": "A: ä\n" + "0" * 64, "mean": [123.675, 0.1]}


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return {
        "b.weight": torch.randn(3, 4),
        "a.weight": torch.randn(4, 3).T,
        "half": torch.randn(5).half(),
        "bfloat16": torch.randn(5).bfloat16(),
        "count": torch.tensor(3),
        "empty": torch.empty(0, 2),
        "expanded": torch.ones(1, 3).expand(2, 3),
    } | dict.fromkeys(("shared", "shared.too"), torch.arange(4))


@pytest.fixture
def file(tmp_path, weights):
    write_checkpoint({"model": weights, **FACTS}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_weights_and_facts_come_back_as_they_were(file, weights, assert_same):
    read = read_checkpoint(file)
    read_weights = read.pop("model")
    assert read == FACTS
    assert_same(dict(sorted(read_weights.items())), dict(sorted(weights.items())))
    read_weights["shared"].zero_()  # the memory is its own
    assert read_weights["shared.too"].tolist() == [0, 1, 2, 3]


def test_others_read_it(file, weights):
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        assert set(opened.keys()) == set(weights)
        assert torch.equal(opened.get_tensor("a.weight"), weights["a.weight"])
    assert list(metadata) == ["sasa_det"]
    assert json.loads(metadata["sasa_det"])["facts"] == FACTS


# What the version before wrote, with each fact under a key of its own.
EARLIER = (
    b"8\x01\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"sasa_det_sha256":"'
    b'6734aa5fa82bf1d4449a00520b7a37b1bb44281338a4c79755a3466b902a8a46","format":"pt",'
    b'"config":"\\"A: \\\\u00e4\\\\n\\"","matching_heuristics":"true","mean":"[123.675, 0.1]"},'
    b'"b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]},'
    b'"a":{"dtype":"I64","shape":[],"data_offsets":[0,8]}}       '
    b"\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00\xc0?\x00\x00\x00\xc0"
)


def test_a_file_of_the_version_before_is_read_with_its_facts(tmp_path, assert_same):
    path = tmp_path / "a.safetensors"
    path.write_bytes(EARLIER)
    weights = {"b": torch.tensor([1.5, -2.0]), "a": torch.tensor(3)}
    facts = {"config": "A: ä\n", "matching_heuristics": True, "mean": [123.675, 0.1]}
    assert_same(read_checkpoint(path), {"model": weights, **facts})
    path.write_bytes(EARLIER.replace(b"0.1]", b"0.2]"))
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        read_checkpoint(path)


def test_a_file_from_elsewhere_gives_its_weights_alone(tmp_path, weights, assert_same):
    weights = {key: weight.contiguous().clone() for key, weight in weights.items()}
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(weights, path, {"format": "pt", "config": "no json", "model": "x"})
    read = read_checkpoint(path)
    assert list(read) == ["model"]
    assert_same(dict(sorted(read["model"].items())), dict(sorted(weights.items())))


def test_a_changed_byte_is_refused(file):
    data = file.read_bytes()
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1
        file.write_bytes(changed)
        try:
            # Where the name of our metadata is changed, the file is one from elsewhere.
            assert list(read_checkpoint(file)) == ["model"]
            assert b'"sasa_det"' not in changed
        except CheckpointError as error:
            assert str(file) in str(error) and "\n" not in str(error)


def header(text, data=b""):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return len(text).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 16,
        (10**12).to_bytes(8, "little") + b"{}",
        header(b"{"),
        header(b"[" * 10_000),
        header({"a": F32}),
        header({"a": {**F32, "shape": [2]}}, bytes(4)),
        header({"a": {**F32, "shape": [2**62, 2**62]}}, bytes(4)),
        header({"a": {**F32, "data_offsets": [0, 2**63]}}, bytes(4)),
        header({"a": {**F32, "data_offsets": [-4, 0]}}, bytes(4)),
        header({"a": {**F32, "dtype": "OBJECT"}}, bytes(4)),
        header({"a": F32, "b": F32}, bytes(4)),
        header({"__metadata__": {"sasa_det_sha256": "0" * 64}, "a": F32}, bytes(4)),
        header({"__metadata__": {"config": {}}, "a": F32}, bytes(4)),
        header({"a": F32}, bytes(8)),
    ],
)
def test_what_is_no_safetensors_file(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=str(path)) as refusal:
        read_checkpoint(path)
    assert "\n" not in str(refusal.value)


def test_a_truncated_file_is_refused(file):
    data = file.read_bytes()
    for size in (4, 100, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=str(file)):
            read_checkpoint(file)


def test_what_json_cannot_hold_is_refused(tmp_path, weights):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="safetensors holds only weights and JSON"):
        write_checkpoint({"model": weights, "trainer": {"state": torch.ones(1)}}, path)
    assert not any(tmp_path.iterdir())


def test_a_write_that_the_disk_refuses_leaves_the_old_file(file, weights):
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="a.safetensors could not be written"):
            write_checkpoint({"model": {"a": torch.ones(10**5)}}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == ["a.safetensors"]


def test_a_model_starts_from_it(tmp_path):
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    write_checkpoint({"model": model.state_dict(), "preprocessing": {}}, tmp_path / "a.safetensors")
    assert Checkpointer(other).load(str(tmp_path / "a.safetensors")) == {"preprocessing": {}}
    assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)

import os
import pickle
import pickletools
import struct

import numpy as np
import pytest
import torch
from detectron2.utils import logger

from sasa_det.checkpoint import CheckpointError, pickles, read_checkpoint, write_checkpoint
from sasa_det.checkpoint.reading import check_finite, classes_in, read_iteration


def dump(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def save(path, content, **options):
    torch.save(content, path, **options)
    return path


def as_python2_writes(data):
    """Turn a pickle of protocol 3 into Python 2's of protocol 2, where bytes are text."""
    result, start = bytearray(data), 0
    codes = {"BINBYTES": b"T", "SHORT_BINBYTES": b"U"}
    for code, _, start in pickletools.genops(data):
        if code.name in codes:
            result[start : start + 1] = codes[code.name]
    result[1:2] = b"\x02"
    return bytes(result)


class Content:
    """A pickle that is written opcode by opcode."""

    def __init__(self, opcodes):
        self.data = b"\x80\x02" + opcodes + b"."


# ------------------------------------------------------------------------------- what is accepted


def test_a_training_state_comes_back_as_it_was(tmp_path, state, assert_same):
    write_checkpoint(state, tmp_path / "a.pth")
    assert_same(read_checkpoint(tmp_path / "a.pth"), state)


@pytest.mark.parametrize("new_format", [True, False])
def test_files_of_plain_torch_save(tmp_path, state, assert_same, new_format):
    path = save(tmp_path / "a.pth", state, _use_new_zipfile_serialization=new_format)
    assert_same(read_checkpoint(path), state)


def test_weights_without_a_model_key_and_without_a_suffix(tmp_path, state, assert_same):
    path = save(tmp_path / "weights", state["model"])
    assert_same(read_checkpoint(path), {"model": state["model"]})


def test_weights_that_are_called_state_dict(tmp_path, state, assert_same):
    path = save(tmp_path / "a.pth.tar", {"epoch": 3, "state_dict": state["model"]})
    assert_same(read_checkpoint(path), {"epoch": 3, "model": state["model"]})


ARRAYS = {
    "float32": np.arange(6, dtype="f4").reshape(2, 3),
    "column by column": np.asfortranarray(np.arange(6, dtype="f8").reshape(2, 3)),
    "big end first": np.arange(3, dtype=">i4"),
    "of no dimensions": np.array(2, dtype="i8"),
    "empty": np.zeros((0, 3), dtype="f2"),
    "bool": np.array([True, False]),
    "bytes above 127": np.arange(256, dtype="u1"),
}


# From protocol 4 on, names have their length before them and cannot be replaced.
@pytest.mark.parametrize(
    ("protocol", "old_names"), [*((n, False) for n in range(6)), *((n, True) for n in range(4))]
)
def test_arrays_of_detectron2s_zoo(tmp_path, protocol, old_names):
    content = {"model": ARRAYS, "__author__": "me", "note": ["x", 1, 2.5, None, (np.float32(1.5),)]}
    data = pickle.dumps(content, protocol=protocol)
    if old_names:
        data = data.replace(b"numpy._core", b"numpy.core")
    (tmp_path / "a.pkl").write_bytes(data)
    read = read_checkpoint(tmp_path / "a.pkl")
    assert read["note"] == ["x", 1, 2.5, None, (1.5,)] and read["__author__"] == "me"
    for key, array in ARRAYS.items():
        tensor = read["model"][key]
        assert tensor.numpy().dtype == array.dtype.newbyteorder("=")
        assert tensor.shape == array.shape and np.array_equal(tensor.numpy(), array)
        tensor.zero_()  # the memory is its own


def test_caffe2_models_of_python_2(tmp_path):
    arrays = {"conv1_w": ARRAYS["bytes above 127"], "conv1_w_momentum": ARRAYS["empty"]}
    for content in (arrays, {"blobs": arrays, "cfg": "text"}):
        data = as_python2_writes(pickle.dumps(content, protocol=3))
        (tmp_path / "a.pkl").write_bytes(data.replace(b"numpy._core", b"numpy.core"))
        read = read_checkpoint(tmp_path / "a.pkl")
        assert list(read["model"]) == ["conv1_w"]
        assert read["model"]["conv1_w"].tolist() == list(range(256))
        assert read["__author__"] == "Caffe2" and read["matching_heuristics"] is True


def test_models_of_pycls(tmp_path):
    weights = {"s1.conv.weight": torch.ones(2), "s1.bn.num_batches_tracked": torch.tensor(3)}
    read = read_checkpoint(save(tmp_path / "a.pyth", {"model_state": weights, "epoch": 3}))
    assert list(read["model"]) == ["s1.conv.weight"]
    assert read["__author__"] == "pycls" and read["matching_heuristics"] is True


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("switch", ["", "1", "yes"])
@pytest.mark.parametrize("suffix", [".pth", ".pyth", ".pkl", ".bin", ".safetensors", ""])
def test_hostile_files_execute_nothing(tmp_path, hostile, monkeypatch, suffix, switch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", switch)
    path = tmp_path / f"a{suffix}"
    for content in (hostile, {"model": hostile}, {"model_state": {"a": hostile}}):
        for write in (
            lambda content: save(path, content),
            lambda content: save(path, content, _use_new_zipfile_serialization=False),
            *(lambda content, n=n: dump(path, content, n) for n in range(6)),
        ):
            write(content)
            with pytest.raises(CheckpointError, match=str(path)):
                read_checkpoint(path)


def test_the_refused_name_is_told(tmp_path, hostile):
    for path in (save(tmp_path / "a.pth", hostile), dump(tmp_path / "a.pkl", hostile)):
        with pytest.raises(CheckpointError, match=r"refers to posix\.system, ") as refusal:
            read_checkpoint(path)
        assert "\n" not in str(refusal.value)


def test_the_ignored_switch_is_told_once(tmp_path, state, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    logger._LOG_COUNTER.clear()
    for _ in range(2):
        read_checkpoint(save(tmp_path / "a.pth", state))
    assert caplog.text.count("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is ignored") == 1


@pytest.mark.parametrize(
    "content",
    [
        np.array([{}, 1], dtype=object),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]),
        np.array([(1, None)], dtype=[("a", "i4"), ("b", "O")]),
        np.array(["text"]),
        np.array(["2026-01-01"], dtype="M8[D]"),
        np.void(b"1234"),
        np.random.RandomState(0),
        {1, 2},
        print,
        np.load,
    ],
    ids=lambda content: type(content).__name__,
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_may_hold_arrays_of_numbers_only(tmp_path, content, protocol):
    path = dump(tmp_path / "a.pkl", {"model": {"a": content}, "__author__": ""}, protocol)
    with pytest.raises(CheckpointError, match="numbers only|is a set, not a tensor"):
        read_checkpoint(path)


# An array of one object: eight bytes of the file taken for a pointer.
_DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00%bK\x00K\x01\x87R"
_POINTER = (
    b"}X\x01\x00\x00\x00acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
    b"C\x01b\x87R(K\x01K\x01\x85%b\x89C\x08\x01\x02\x03\x04\x05\x06\x07\x08tbs"
)
_FIELDS = (
    b"(K\x03X\x01\x00\x00\x00|NX\x01\x00\x00\x00a\x85}X\x01\x00\x00\x00a"
    b"cnumpy\ndtype\nX\x02\x00\x00\x00O8K\x00K\x01\x87RK\x00\x86sK\x08K\x01K\x1btb"
)


@pytest.mark.parametrize(
    "opcodes",
    [
        _POINTER % (_DTYPE % b"O8"),
        _POINTER % (_DTYPE % b"V8" + _FIELDS),
        _POINTER % (_DTYPE % b"i8" + _FIELDS),
        # numpy.ndarray itself, called with a type of objects
        b"cnumpy\nndarray\nK\x01\x85X\x01\x00\x00\x00O\x86R",
        b"cnumpy\nndarray\nK\x01\x85\x81",
        # new defaults for a function that is allowed
        b"c_codecs\nencode\nN}X\x0c\x00\x00\x00__defaults__N\x85s\x86b",
        # attributes of what is allowed
        b"c_codecs\nencode.__self__\n",
        b"cnumpy\ndtype.__new__\n",
        # extension codes and persistent names
        b"\x82\x01",
        b"X\x01\x00\x00\x00aQ",
    ],
)
def test_pickles_written_by_hand(tmp_path, opcodes):
    (tmp_path / "a.pkl").write_bytes(Content(opcodes).data)
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    ("name", "stand_in"),
    [
        (b"numpy\ndtype\n", pickles._Dtype),
        (b"collections\nOrderedDict\n", pickles._Dict),
        (b"numpy.core.multiarray\n_reconstruct\n", pickles._Array),
    ],
)
@pytest.mark.parametrize("state", [b"}X\x01\x00\x00\x00aK\x01s", b"N}X\x01\x00\x00\x00aK\x01s\x86"])
def test_a_pickle_sets_no_attribute_of_a_class(tmp_path, name, stand_in, state):
    (tmp_path / "a.pkl").write_bytes(Content(b"c" + name + state + b"b").data)
    with pytest.raises(CheckpointError, match="TypeError"):
        read_checkpoint(tmp_path / "a.pkl")
    assert not hasattr(stand_in, "a")


def test_the_pickle_written_by_hand_is_read_where_it_is_of_numbers(tmp_path):
    number = struct.unpack("<q", bytes(range(1, 9)))
    (tmp_path / "a.pkl").write_bytes(Content(_POINTER % (_DTYPE % b"i8")).data)
    assert read_checkpoint(tmp_path / "a.pkl")["model"]["a"].tolist() == list(number)


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pyth"])
@pytest.mark.parametrize("content", [b"", b"P", b"text\n" * 99, b"PK\x03\x04" * 99, bytes(4096)])
def test_what_is_no_checkpoint(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=str(path)) as refusal:
        read_checkpoint(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "content",
    [
        3,
        [torch.ones(1)],
        {"model": torch.ones(1)},
        {"model": {"a": "b"}},
        {"model": {1: torch.ones(1)}},
        {"model": {"a": torch.eye(2).to_sparse()}},
        {"model": {"a": torch.ones(2, device="meta")}},
    ],
)
def test_a_checkpoint_has_a_dict_of_tensors(tmp_path, content):
    with pytest.raises(CheckpointError, match="cannot be used: it"):
        read_checkpoint(save(tmp_path / "a.pth", content))


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(CheckpointError, match="a.pth cannot be read .No such file"):
        read_checkpoint(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="cannot be read .Is a directory"):
        read_checkpoint(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="a.pth cannot be used: it is not a regular file"):
        read_checkpoint(tmp_path / "a.pth")


def test_torchscript_is_no_checkpoint(tmp_path):
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "a.pth"))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "a.pth")


# -------------------------------------------------------------------------------------- the rest


def test_the_iteration_is_read_alone(tmp_path, state, hostile):
    write_checkpoint(state, tmp_path / "a.pth")
    assert read_iteration(tmp_path / "a.pth") == 7
    for content in (state["model"], {"iteration": "7"}, {"iteration": -1}, [1]):
        with pytest.raises(CheckpointError, match="b.pth holds no training state"):
            read_iteration(save(tmp_path / "b.pth", content))
    with pytest.raises(CheckpointError, match="posix.system"):
        read_iteration(save(tmp_path / "b.pth", hostile))


@pytest.mark.parametrize(
    "dtype", [torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite(dtype, value):
    weights = {"fine": torch.ones(3), "none": torch.ones(0), "count": torch.tensor(3)}
    weights["edge"] = torch.full((2,), torch.finfo(dtype).max, dtype=dtype)
    check_finite({"model": weights}, "a.pth")
    weights["bad"] = torch.tensor([1.0, value, 2.0], dtype=dtype)
    with pytest.raises(CheckpointError, match="a.pth: the weight bad is not finite"):
        check_finite({"model": weights}, "a.pth")


def test_reading_changes_nothing(tmp_path, state):
    write_checkpoint(state, tmp_path / "a.pth")
    before = (tmp_path / "a.pth").read_bytes()
    read_checkpoint(tmp_path / "a.pth")
    assert (tmp_path / "a.pth").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pth"]


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"trainer": {"classes": ["a"]}}, ["a"]),
        ({"classes": ["a", "b"], "trainer": {}}, ["a", "b"]),
        ({}, None),
        ({"trainer": 3, "classes": 80}, None),
        ({"classes": [1, 2]}, None),
    ],
)
def test_classes_of_a_model(content, expected):
    assert classes_in(content) == expected

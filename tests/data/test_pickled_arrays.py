"""Pickles of one array: read to what was pickled, and refused without running anything of them."""

import gzip
import os
import pickle
import pickletools
import tracemalloc

import numpy as np
import pytest

from sasa_det.data.pickled_arrays import read_pickled_array
from sasa_det.errors import DatasetError

IMAGES = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
LABELS = np.array([3, 1, -4, 1, 2**40], dtype="<i8")


def written(tmp_path, data):
    path = tmp_path / "array.gz"
    path.write_bytes(gzip.compress(data))
    return path


def pickled(value, protocol=4):
    return pickle.dumps(value, protocol=protocol)


@pytest.mark.parametrize(
    "array",
    [
        IMAGES,
        LABELS,
        np.arange(600, dtype=np.uint8).reshape(20, 30),  # a longer opcode for its content
        np.arange(9000, dtype="<i8").reshape(3000, 3),  # content outside of a frame
        np.arange(70_000) % 7 == 0,  # and a longer one for its shape
        np.linspace(-1, 1, 12, dtype="<f4").reshape(2, 3, 2),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_are_read_as_the_unpickler_reads_them(array, tmp_path):
    data = pickled(array)
    found = read_pickled_array(written(tmp_path, data), array.dtype, array.shape)
    expected = pickle.loads(data)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_arrays_of_numpy_1_and_2(module, tmp_path):
    ours = np.zeros(1).__reduce__()[0].__module__.encode()
    data = pickled(LABELS)
    assert data.count(ours) == 1
    # The lengths of the name and of the frame around it change with it.
    data = data.replace(bytes([len(ours)]) + ours, bytes([len(module)]) + module)
    frame = int.from_bytes(data[3:11], "little") + len(module) - len(ours)
    data = data[:3] + frame.to_bytes(8, "little") + data[11:]
    assert np.array_equal(read_pickled_array(written(tmp_path, data), "<i8", (5,)), LABELS)


class Touch:
    """Would make a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Array(np.ndarray):
    pass


def replaced(array, old, new):
    """The pickle of an array with one text in place of another of the same length."""
    data = pickled(array)
    assert len(old) == len(new) and data.count(old) == 1
    return data.replace(old, new)


REFUSED = {
    "dtype": (pickled(IMAGES.astype(np.int8)), r"at byte \d+ it has another dtype"),
    "wider": (pickled(IMAGES.astype(np.int64)), r"at byte \d+ it has another dtype"),
    "objects": (pickled(IMAGES.astype(object)), r"at byte \d+ it has another dtype"),
    "records": (pickled(np.zeros((5, 4, 3), "u1,u1")), r"at byte \d+ it has another dtype"),
    "shape": (pickled(IMAGES[:, :2]), r"at byte \d+ it has another shape"),
    "turned": (pickled(IMAGES.reshape(3, 4, 5)), r"at byte \d+ it has another shape"),
    "dimensions": (pickled(IMAGES.reshape(20, 3)), r"at byte \d+ it has another shape"),
    "Fortran": (pickled(np.asfortranarray(IMAGES)), r"at byte \d+ it has another order in memory"),
    "two": (pickled([IMAGES, IMAGES]), r"at byte \d+ it has another type"),
    "pair": (pickled((IMAGES, IMAGES)), r"at byte \d+ it has another (type|end)"),
    "after": (pickled(IMAGES) + pickled(IMAGES), r"it goes on after the end .* at byte \d+"),
    "subclass": (pickled(IMAGES.view(Array)), r"at byte \d+ it has another type"),
    "number": (pickled(7), r"at byte \d+ it has another type"),
    "text": (pickled("numpy"), r"at byte \d+ it has another type"),
    "function": (
        replaced(IMAGES, b"_reconstruct", b"set_typeDict"),
        r"at byte \d+ it has another type",
    ),
    "protocol": (pickled(IMAGES, 3), r"at byte 0 it has another protocol"),
    "later protocol": (pickled(IMAGES, 5), r"at byte 0 it has another protocol"),
    "content": (
        pickled(IMAGES).replace(b"C\x3c" + IMAGES.tobytes(), b"C\x3b" + IMAGES.tobytes()[1:]),
        r"its content has 59 bytes",
    ),
    "cut": (pickled(IMAGES)[:-30], r"it has another|expected|exhausted"),
    "without its end": (pickled(IMAGES)[:-1], r"exhausted"),
    "nothing": (b"", r"exhausted"),
    "no pickle": (b"\xff\xd8\xff", r"opcode"),
}


@pytest.mark.parametrize("data, reason", REFUSED.values(), ids=REFUSED)
def test_everything_else_is_refused(data, reason, tmp_path):
    path = written(tmp_path, data)
    with pytest.raises(DatasetError, match=reason) as refused:
        read_pickled_array(path, np.uint8, (5, 4, 3))
    assert str(refused.value).startswith(
        f"{path} must hold the pickle, of protocol 4, of one numpy array of uint8 of the shape "
        "(5, 4, 3) in C order, but "
    )
    assert "\n" not in str(refused.value)


def test_byte_order(tmp_path):
    path = written(tmp_path, pickled(LABELS.astype(">i8")))
    with pytest.raises(DatasetError, match="another byte order"):
        read_pickled_array(path, "<i8", (5,))


@pytest.mark.parametrize("around", [lambda o: o, lambda o: (IMAGES, o), lambda o: [o, IMAGES]])
def test_nothing_of_a_file_is_executed(around, tmp_path):
    made = tmp_path / "made"
    path = written(tmp_path, pickled(around(Touch(made))))
    with pytest.raises(DatasetError, match="in C order, but at byte"):
        read_pickled_array(path, np.uint8, (5, 4, 3))
    assert not made.exists()
    pickle.loads(gzip.decompress(path.read_bytes()))
    assert made.exists()  # so the file would have


def test_a_change_of_any_byte_before_the_content_is_noticed(tmp_path):
    """But of FRAME, which is for readers of streams, and of the numbers of MEMOIZE."""
    data = pickled(IMAGES)
    start = data.index(IMAGES.tobytes()) - 2
    frame = range(2, 11)
    path = tmp_path / "array.gz"
    free = {p for op, _, p in pickletools.genops(data) if op.name == "MEMOIZE"} | {*frame}
    for position in {*range(start)} - free:
        changed = bytearray(data)
        changed[position] ^= 1
        path.write_bytes(gzip.compress(bytes(changed), 0))
        with pytest.raises(DatasetError, match="in C order, but "):
            read_pickled_array(path, np.uint8, (5, 4, 3))


@pytest.mark.parametrize("data", [b"no gzip", gzip.compress(pickled(IMAGES))[:-20], b"\x1f\x8b"])
def test_what_gzip_cannot_read(data, tmp_path):
    path = tmp_path / "array.gz"
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"array\.gz cannot be read as a file of gzip: "):
        read_pickled_array(path, np.uint8, (5, 4, 3))
    with pytest.raises(DatasetError, match=r"absent cannot be read as a file of gzip: "):
        read_pickled_array(tmp_path / "absent", np.uint8, (5, 4, 3))


def test_no_more_is_unpacked_than_an_array_has(tmp_path):
    path = written(tmp_path, pickled(IMAGES) + bytes(20_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(DatasetError, match="goes on after the end"):
            read_pickled_array(path, np.uint8, (5, 4, 3))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000

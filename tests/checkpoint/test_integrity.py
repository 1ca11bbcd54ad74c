import random
import zipfile

import pytest
import torch

from sasa_det.checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from sasa_det.checkpoint.reading import check_file


@pytest.fixture
def ours(tmp_path, state):
    write_checkpoint(state, tmp_path / "ours.pth")
    return tmp_path / "ours.pth"


@pytest.fixture
def foreign(tmp_path, state):
    torch.save(state, tmp_path / "foreign.pth")
    return tmp_path / "foreign.pth"


def flips(data):
    """Give all files that differ from one in a random bit of one byte."""
    draw = random.Random(0)
    for index in range(len(data)):
        changed = bytearray(data)
        changed[index] ^= 1 << draw.randrange(8)
        yield index, bytes(changed)


def test_any_flipped_byte_is_refused(ours, tmp_path):
    path = tmp_path / "flipped.pth"
    for index, changed in flips(ours.read_bytes()):
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            check_file(path)
            pytest.fail(f"byte {index}")


def test_a_flipped_byte_of_a_large_file_is_refused(tmp_path):
    """Which is read in parts of a mebibyte."""
    path = tmp_path / "large.pth"
    write_checkpoint({"model": {"weight": torch.zeros(3 << 18)}}, path)
    data = path.read_bytes()
    assert len(data) > 3 << 20
    for place in (1 << 10, (1 << 20) + 7, (5 << 19) + 7, len(data) - 400):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CheckpointError):
            check_file(path)
            pytest.fail(f"byte {place}")


def test_a_flipped_byte_is_refused_by_reading(ours, tmp_path):
    path = tmp_path / "flipped.pth"
    data = bytearray(ours.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="flipped.pth .* does not match its checksum"):
        read_checkpoint(path)


def test_any_other_length_is_refused(ours, tmp_path):
    path = tmp_path / "cut.pth"
    data = ours.read_bytes()
    for changed in (*(data[:size] for size in range(len(data))), data + b"\0", data + data):
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


def test_a_flipped_byte_of_a_foreign_record_is_refused(foreign, tmp_path):
    path = tmp_path / "flipped.pth"
    with zipfile.ZipFile(foreign) as archive:
        inside = set()
        for record in archive.infolist():
            with archive.open(record) as file:
                file.read()
            with open(foreign, "rb") as file:
                file.seek(record.header_offset + 26)
                name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            start = record.header_offset + 30 + name + extra
            inside.update(range(start, start + record.file_size))
    assert len(inside) > 500
    for index, changed in flips(foreign.read_bytes()):
        if index in inside:
            path.write_bytes(changed)
            with pytest.raises(CheckpointError):
                check_file(path)
                pytest.fail(f"byte {index}")


def test_no_flipped_byte_of_a_foreign_file_changes_what_is_read(
    foreign, tmp_path, state, assert_same
):
    path = tmp_path / "flipped.pth"
    for _, changed in flips(foreign.read_bytes()):
        path.write_bytes(changed)
        try:
            read = read_checkpoint(path)
        except CheckpointError:
            continue
        assert_same(read, state)


def test_a_foreign_file_of_another_length_is_refused(foreign, tmp_path):
    path = tmp_path / "cut.pth"
    data = foreign.read_bytes()
    for changed in (*(data[:size] for size in range(0, len(data), 7)), data[:-1], data + b"\0"):
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


def test_a_bomb_is_refused(foreign, tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    assert path.stat().st_size < 10**5
    with pytest.raises(CheckpointError, match="compressed"):
        read_checkpoint(path)


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_and_zip_read_our_files(ours, state, assert_same, mmap):
    assert_same(torch.load(ours, weights_only=True, mmap=mmap), state)
    with zipfile.ZipFile(ours) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sasa_det sha256 ")

import hashlib
import socket

import pytest

from sasa_det.checkpoint import CheckpointError
from sasa_det.checkpoint.sources import check_sha256, locate

DIGEST = "0123456789abcdef" * 4


@pytest.fixture
def file(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"content")
    return tmp_path / "a.pth"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_paths(file, monkeypatch):
    assert locate(file).path == locate(str(file)).path == file
    assert locate(f"{file}?matching_heuristics=True").matching_heuristics
    assert not locate(f"{file}?matching_heuristics=False").matching_heuristics
    assert not locate(file).matching_heuristics
    monkeypatch.chdir(file.parent)
    assert locate("a.pth?matching_heuristics=True").path.read_bytes() == b"content"


@pytest.mark.parametrize("name", ["a?b.pth", "a#b.pth", "https:.pth", "a%20b.pth", "a [1].pth"])
def test_names_of_files_that_look_like_addresses(tmp_path, name, monkeypatch):
    (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert locate(name).path.samefile(tmp_path / name)


def test_the_digest_of_a_path(file):
    digest = hashlib.sha256(b"content").hexdigest()
    assert locate(f"{file}#sha256={digest}").path == file
    assert locate(f"{file}?matching_heuristics=True#sha256={digest.upper()}").matching_heuristics
    with pytest.raises(CheckpointError, match=f"a.pth has the SHA-256 {digest}, not {DIGEST}"):
        locate(f"{file}#sha256={DIGEST}")
    with pytest.raises(CheckpointError, match="missing.pth cannot be read"):
        locate(f"{file.parent}/missing.pth#sha256={DIGEST}")


def test_a_downloaded_file_is_checked(file):
    check_sha256(file, hashlib.sha256(b"content").hexdigest())
    file.write_bytes(b"contend")
    with pytest.raises(CheckpointError, match="not "):
        check_sha256(file, hashlib.sha256(b"content").hexdigest())


@pytest.mark.parametrize(
    ("address", "cached"),
    [
        ("https://example.com/folder/a.pth", "folder/a.pth"),
        ("detectron2://ImageNet/R-50.pkl", "detectron2/ImageNet/R-50.pkl"),
    ],
)
def test_what_was_downloaded_before_is_checked_too(tmp_path, monkeypatch, address, cached):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    (tmp_path / cached).parent.mkdir(parents=True)
    (tmp_path / cached).write_bytes(b"content")
    digest = hashlib.sha256(b"content").hexdigest()
    source = locate(f"{address}?matching_heuristics=True#sha256={digest}")
    assert source.path == tmp_path / cached and source.matching_heuristics
    (tmp_path / cached).write_bytes(b"contend")
    with pytest.raises(CheckpointError, match=f"{cached} has the SHA-256 .*, not {digest}"):
        locate(f"{address}#sha256={digest}")


@pytest.mark.parametrize(
    "weights",
    [
        "http://example.com/a.pth",
        f"http://example.com/a.pth#sha256={DIGEST}",
        f"HTTP://example.com/a.pth#sha256={DIGEST}",
        f"ftp://example.com/a.pth#sha256={DIGEST}",
        f"file:///a.pth#sha256={DIGEST}",
        f"catalog://ImageNetPretrained/MSRA/R-50#sha256={DIGEST}",
    ],
)
def test_schemes_that_are_refused(weights):
    with pytest.raises(CheckpointError, match="must be a path or begin with https:// or detectron"):
        locate(weights)


@pytest.mark.parametrize(
    "weights", ["https://example.com/a.pth", "detectron2://a/b.pkl", "HTTPS://example.com/a.pth"]
)
def test_remote_weights_need_a_digest(weights):
    with pytest.raises(CheckpointError, match="are remote: give the SHA-256"):
        locate(weights)


@pytest.mark.parametrize("end", ["#sha256=0", f"#md5={DIGEST}", f"#sha256={DIGEST}0", "#sha256="])
def test_digests_that_are_none(end):
    with pytest.raises(CheckpointError, match="64 hexadecimal digits may follow"):
        locate("https://example.com/a.pth" + end)


@pytest.mark.parametrize("end", ["?matching_heuristics=1", "?a=b", "?matching_heuristics=True&a="])
def test_options_that_are_none(end):
    with pytest.raises(CheckpointError, match="only matching_heuristics=True may follow"):
        locate("a.pth" + end)

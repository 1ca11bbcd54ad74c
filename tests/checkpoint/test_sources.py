import hashlib
import socket
import urllib.error
import urllib.request

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


@pytest.fixture
def server(monkeypatch, tmp_path):
    """What the network holds by address; lists what was downloaded."""
    content, downloads = {}, []

    def open_address(address, *args, **kwargs):
        downloads.append(address)
        if address not in content:
            raise urllib.error.URLError("no such file")
        path = tmp_path / "served"
        path.write_bytes(content[address])
        return urllib.request.OpenerDirector.open(opener, path.as_uri())

    opener = urllib.request.build_opener()
    monkeypatch.setattr(urllib.request, "urlopen", open_address)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return content, downloads


ADDRESSES = [
    ("https://example.com/folder/a.pth", "folder/a.pth", "https://example.com/folder/a.pth"),
    (
        "detectron2://ImageNet/R-50.pkl",
        "detectron2/ImageNet/R-50.pkl",
        "https://dl.fbaipublicfiles.com/detectron2/ImageNet/R-50.pkl",
    ),
]


@pytest.mark.parametrize(("name", "cached", "address"), ADDRESSES)
def test_what_was_downloaded_before_is_used_or_downloaded_anew(
    tmp_path, server, caplog, name, cached, address
):
    content, downloads = server
    path = tmp_path / "cache" / cached
    path.parent.mkdir(parents=True)
    path.write_bytes(b"content")
    digest = hashlib.sha256(b"content").hexdigest()
    source = locate(f"{name}?matching_heuristics=True#sha256={digest}")
    assert source.path == path and source.matching_heuristics
    assert downloads == []

    # The server's file has changed, and what MODEL.WEIGHTS says with it.
    content[address] = b"changed"
    changed = hashlib.sha256(b"changed").hexdigest()
    with caplog.at_level("WARNING"):
        assert locate(f"{name}#sha256={changed}").path == path
    assert path.read_bytes() == b"changed" and downloads == [address]
    assert f"In the cache, {path} has the SHA-256" in caplog.text and address in caplog.text
    assert locate(f"{name}#sha256={changed}").path == path and downloads == [address]

    # What is neither in the cache nor there is refused, and the cache is left as it was.
    refusal = f"{address} has the SHA-256 {changed}, not {DIGEST} as the name of the weights "
    refusal += r"\(MODEL.WEIGHTS, or train.init_checkpoint in a LazyConfig\) says"
    with pytest.raises(CheckpointError, match=refusal):
        locate(f"{name}#sha256={DIGEST}")
    content.clear()
    with pytest.raises(CheckpointError, match="cannot be downloaded"):
        locate(f"{name}#sha256={DIGEST}")
    kept = [p for p in path.parent.iterdir() if p.suffix != ".lock"]
    assert kept == [path] and path.read_bytes() == b"changed"


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

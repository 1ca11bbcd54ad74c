"""A small COCO set on disk, for tests to break."""

import copy
import hashlib
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from sasa_det.data.wheels import Member, Package

# Ids are neither dense nor sorted, so that an order by position would show.
VALID = {
    "images": [
        {"id": 7, "file_name": "a.png", "height": 4, "width": 6},
        {"id": 3, "file_name": "sub/b.png", "height": 4, "width": 6},
    ],
    "annotations": [
        {
            "id": 11,
            "image_id": 7,
            "category_id": 5,
            "bbox": [1, 1, 2, 2],
            "area": 4,
            "iscrowd": 0,
        }
    ],
    "categories": [{"id": 9, "name": "cup"}, {"id": 5, "name": "ant"}],
}


@pytest.fixture
def content():
    return copy.deepcopy(VALID)


@pytest.fixture
def write(tmp_path):
    """Writes json content beside two real images and returns the file and the image folder."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png"):
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(root / name)

    def writer(content, name="set.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path, root

    return writer


@pytest.fixture
def make_package(tmp_path, monkeypatch):
    """Makes a wheel as pip accepts it, where pip looks for packages, and returns what to fetch."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))

    def make(name, content, files, members):
        wheel = index / f"{name}-1.5-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for path, data in files.items():
                archive.writestr(path, data)
            # Nothing of it is ever run.
            archive.writestr(f"{name}/__init__.py", "raise SystemExit('imported')")
            archive.writestr(
                f"{name}-1.5.dist-info/METADATA",
                f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\nRequires-Dist: absent\n",
            )
            archive.writestr(
                f"{name}-1.5.dist-info/WHEEL",
                "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            )
            archive.writestr(f"{name}-1.5.dist-info/RECORD", "")
        return Package(
            name=name,
            version="1.5",
            content=content,
            wheel=wheel.name,
            sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
            megabytes=1,
            members={
                path: Member(member, hashlib.sha256(files[member]).hexdigest())
                for path, member in members.items()
            },
        )

    return make

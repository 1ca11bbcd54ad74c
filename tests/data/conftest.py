"""A small COCO set on disk, for tests to break."""

import copy
import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

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
def unregister():
    names = []
    yield names
    for name in names:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
        if name in MetadataCatalog:
            MetadataCatalog.remove(name)

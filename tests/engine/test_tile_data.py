"""Data sets cut into tiles: every box is that of the pixels which its object was painted with."""

import json
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from sasa_det.data import validate_coco
from sasa_det.data.tiling import Tile
from sasa_det.engine.tile_data import write_tiles

SIZE = 64


@pytest.fixture
def tool(monkeypatch, capfd):
    """Return a function that runs the command and gives its exit status and what it printed."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["tools/tile_data.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path("tools/tile_data.py", run_name="__main__")
        return end.value.code, "".join(capfd.readouterr())

    return call


@pytest.fixture
def data(tmp_path):
    """Two large images and a small one; the pixels of an object have the number of it."""
    rng = np.random.default_rng(0)
    sizes = {"a/photo.png": (150, 133), "b/photo.png": (64, 200), "small.png": (40, 50)}
    images, annotations = [], []
    for image_id, (name, (height, width)) in enumerate(sizes.items(), 7):
        pixels = np.zeros((height, width, 3), np.uint8)
        for _ in range(200):
            h, w = rng.integers(4, SIZE // 2, 2)
            y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            if not pixels[y : y + h, x : x + w].any():
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": int(rng.choice([3, 9])),
                        "bbox": [int(x), int(y), int(w), int(h)],
                        "area": int(w * h),
                        "iscrowd": 0,
                    }
                )
                pixels[y : y + h, x : x + w] = len(annotations)
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 9, "name": "tree"}, {"id": 3, "name": "house"}],
    }
    (tmp_path / "data.json").write_text(json.dumps(content))
    return tmp_path / "data.json", tmp_path / "images"


def content_of(folder):
    return json.loads((folder / "annotations.json").read_text())


@pytest.mark.parametrize("words, turned", [((), 1), (("--turns",), 4)])
def test_boxes_are_those_of_the_painted_pixels(tool, data, tmp_path, words, turned):
    output = tmp_path / "tiles"
    status, printed = tool("--input", *data, "--size", SIZE, *words, "--output", output)
    assert status == 0, printed
    assert "whole in no tile" not in printed and "masks" not in printed
    truth = {entry["id"]: entry for entry in json.loads(data[0].read_text())["annotations"]}
    content = content_of(output)
    # Starts at 0, 32, 64, 86 and 0, 32, 64, 69; at 0, 32, 64, 96, 128, 136; the small one whole.
    assert len(content["images"]) == turned * (4 * 4 + 6 + 1)
    assert sorted(p.name for p in (output / "images").iterdir()) == sorted(
        image["file_name"] for image in content["images"]
    )
    whole = set()
    for image in content["images"]:
        pixels = np.asarray(Image.open(output / "images" / image["file_name"]))[:, :, 0]
        assert pixels.shape == (image["height"], image["width"])
        expected = []
        for number in set(np.unique(pixels)) - {0}:
            rows, columns = np.nonzero(pixels == number)
            area = truth[number]["area"]
            if len(rows) == area:
                whole.add(number)
            if 5 * len(rows) >= 2 * area:
                x0, y0 = columns.min(), rows.min()
                box = [x0, y0, columns.max() + 1 - x0, rows.max() + 1 - y0]
                expected.append((truth[number]["category_id"], box, len(rows)))
        found = [
            (entry["category_id"], entry["bbox"], entry["area"])
            for entry in content["annotations"]
            if entry["image_id"] == image["id"]
        ]
        assert sorted(found) == sorted(expected)
    assert whole == set(truth)
    images = {image["id"] for image in json.loads(data[0].read_text())["images"]}
    assert {int(image["file_name"].split("_")[0]) for image in content["images"]} == images
    # As the last line says.
    words = printed.partition("give --train ")[2].split()[:2]
    report = validate_coco(*words, training=True, pixels=True)
    assert report.is_accepted(True) and report.class_names == ("house", "tree")


def test_more_must_be_visible_if_asked(tool, data, tmp_path):
    flags = ["--input", *data, "--size", SIZE, "--min-visible"]
    counts = {}
    for least in (0, 0.4, 1):
        status, _ = tool(*flags, least, "--output", tmp_path / str(least))
        assert status == 0
        counts[least] = len(content_of(tmp_path / str(least))["annotations"])
    assert counts[0] > counts[0.4] > counts[1] > 20


def test_what_is_larger_than_the_overlap_masks_and_crowds(tool, data, tmp_path):
    content = json.loads(data[0].read_text())
    content["annotations"] = [
        {
            "id": 5,
            "image_id": 7,
            "category_id": 9,
            "bbox": [10, 10, 100, 30],
            "area": 3000,
            "iscrowd": crowd,
            "segmentation": [[10, 10, 110, 10, 110, 40]],
        }
        for crowd in (0, 1)
    ]
    content["annotations"][1] |= {"id": 6, "segmentation": {"size": [150, 133], "counts": [19950]}}
    data[0].write_text(json.dumps(content))
    flags = ["--input", *data, "--size", SIZE, "--overlap", 0, "--output", tmp_path / "tiles"]
    status, printed = tool(*flags)
    assert status == 0, printed
    assert "Only boxes are cut: masks and keypoints are left out." in printed
    assert "2 objects are whole in no tile" in printed
    boxes = [(a["bbox"], a["iscrowd"]) for a in content_of(tmp_path / "tiles")["annotations"]]
    # Columns 10 to 64, 64 to 110 and, in a tile at the right border from 69, 69 to 110.
    assert boxes[0] == ([10, 10, 54, 30], 0)
    assert ([0, 10, 46, 30], 0) in boxes and ([0, 10, 41, 30], 0) in boxes
    assert {box for box, crowd in map(lambda b: (tuple(b[0]), b[1]), boxes) if crowd} == {
        (10, 10, 54, 30),
        (0, 10, 46, 30),
        (0, 10, 41, 30),
    }


def test_what_is_refused(tool, data, tmp_path):
    output = tmp_path / "tiles"

    def refused(*words):
        code, printed = tool(*words)
        assert code == 2 and "Traceback" not in printed, printed
        assert not output.exists() and not list(tmp_path.glob(".tiles-*"))
        return printed.splitlines()[-1]

    flags = ["--input", *data, "--output", output, "--size"]
    assert "--overlap: must be below 1, got '1'" in refused(*flags, 64, "--overlap", 1)
    assert "--size: must be an integer of at least 1, got '0'" in refused(*flags, 0)
    assert "more than the 1,000 that max_pixels" in refused(*flags, 64, "--max-pixels", 1000)
    told = refused("--input", data[0], "--size", 64, "--output", output)
    assert "expected the image folder" in told
    # Broken pixels are only found when they are read.
    path = data[1] / "small.png"
    path.write_bytes(path.read_bytes()[:-30])
    assert f"image {path} cannot be read" in refused(*flags, 64)
    path.unlink()
    assert "image files are missing" in refused(*flags, 64)
    output.mkdir()
    (output / "mine").touch()
    status, printed = tool(*flags, 64)
    assert status == 2 and f"output {output} exists already; name another one." in printed
    assert [each.name for each in output.iterdir()] == ["mine"]


def test_parts_of_ones_own(data, tmp_path):
    """As trainings need that hold out a part of a photograph."""
    counts = write_tiles(
        *data,
        tmp_path / "lower",
        lambda h, w: [Tile(0, h // 2, w, h)],
        min_visible=0.5,
        info={"a": 1},
    )
    content = content_of(tmp_path / "lower")
    assert (counts.images, counts.tiles) == (3, 3) and content["info"] == {"a": 1}
    assert [image["height"] for image in content["images"]] == [75, 32, 20]

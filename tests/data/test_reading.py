"""Broken image files as they occur, and what is said about them."""

import logging
import os
import pickle
import re
import struct
import zlib

import numpy as np
import pytest
from detectron2.config import get_cfg
from PIL import EpsImagePlugin, Image
from torch.utils.data import DataLoader

from sasa_det.config import add_sasa_config
from sasa_det.data import (
    ClassificationMapper,
    DatasetError,
    ImageError,
    UnreadableImages,
    build_test_mapper,
    build_train_mapper,
)
from sasa_det.data.images import check_size, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def truncated(path):
    Image.fromarray(PIXELS).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def chunk(name, content):
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png(path, width, height, *, data=b"", rest=b""):
    """Write a colour PNG file whose header and data need not fit together."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + rest
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b""))


FAULTS = {
    "missing.png": (lambda path: None, "does not exist"),
    "folder.png": (lambda path: path.mkdir(), "cannot be read: Is a directory"),
    "empty.png": (lambda path: path.touch(), "is empty"),
    "text.png": (lambda path: path.write_text("no image"), "is not an image"),
    "truncated.png": (truncated, "cannot be read: image file is truncated"),
    "truncated.jpg": (truncated, "cannot be read: image file is truncated"),
    "broken.png": (
        lambda path: png(path, 60, 40, rest=chunk(b"\1\2\3\4", b"")),
        "cannot be read: broken PNG file",
    ),
    "header.png": (lambda path: png(path, 60, 40), "cannot be read: image file is truncated"),
    "bomb.png": (lambda path: png(path, 20000, 20000), "has 20000 x 20000 pixels, more than"),
    "large.png": (
        lambda path: png(path, 10001, 10000),
        "more than the 100,000,000 that max_pixels (INPUT.MAX_PIXELS) allows",
    ),
    "other.png": (
        lambda path: Image.fromarray(PIXELS[:, :50]).save(path),
        "has 50 x 40 pixels, but its annotations are for 60 x 40",
    ),
}


def config():
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (40,), 40
    return cfg


def record(path):
    return {"file_name": str(path), "height": 40, "width": 60, "annotations": []}


USES = ("train", "jitter", "test", "check", "classify")
# A class is that of an image of any size.
CASES = [(n, u) for n in FAULTS for u in USES if (n, u) != ("other.png", "classify")]


@pytest.mark.parametrize("name, use", CASES)
def test_fault_is_told_with_the_path(tmp_path, name, use):
    make, message = FAULTS[name]
    path = tmp_path / name
    make(path)
    cfg = config()
    cfg.INPUT.JITTER.ENABLED = use == "jitter"
    with pytest.raises(ImageError) as error:
        if use == "check":
            check_size(str(path), read_image(str(path), cfg.INPUT.MAX_PIXELS), (40, 60))
        elif use == "classify":
            ClassificationMapper(is_train=False)(record(path))
        else:
            (build_test_mapper if use == "test" else build_train_mapper)(cfg)(record(path))
    text = str(error.value)
    assert text.startswith(f"image {path} ") and message in text and "\n" not in text
    assert error.value.path == str(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_images_of_8_bits_pass_and_are_mapped(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(PIXELS).convert(mode).save(path)
    check_size(str(path), read_image(str(path), 40 * 60), (40, 60))
    for mapper in (build_train_mapper(config()), build_test_mapper(config())):
        assert mapper(record(path))["image"].shape == (3, 40, 60)
    with pytest.raises(ImageError, match="60 x 40 pixels, more than the 2,399"):
        read_image(str(path), 40 * 60 - 1)


def test_turned_image_has_the_size_it_is_seen_in(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif)
    check_size(str(tmp_path / "a.jpg"), read_image(str(tmp_path / "a.jpg"), 10_000), (60, 40))
    with pytest.raises(ImageError, match="has 40 x 60 pixels"):
        check_size(str(tmp_path / "a.jpg"), read_image(str(tmp_path / "a.jpg"), 10_000), (40, 60))


def test_higher_limit_than_pillows_has_its_way(tmp_path, monkeypatch):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "a.png")
    for mapper in (build_train_mapper(config()), build_test_mapper(config())):
        assert mapper(record(tmp_path / "a.png"))["image"].shape == (3, 40, 60)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_postscript_is_not_run(tmp_path, monkeypatch):
    marker, ghostscript = tmp_path / "marker", tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {marker}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(ghostscript.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path = tmp_path / "a.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n%%EndComments\nshowpage\n")
    mappers = build_train_mapper(config()), build_test_mapper(config())
    for mapper in (*mappers, ClassificationMapper(is_train=True)):
        with pytest.raises(ImageError, match="a.jpg is a PostScript program, which is never run"):
            mapper(record(path))
    assert not marker.exists()
    # It would be run.
    with pytest.raises(OSError):
        Image.open(path).load()
    assert marker.exists()


def error(name):
    return ImageError(f"image {name} is empty", name)


def test_error_survives_the_way_between_processes():
    copy = pickle.loads(pickle.dumps(error("a.png")))
    assert (str(copy), copy.path) == ("image a.png is empty", "a.png")


LIMIT = "max_unreadable (DATALOADER.SKIP_UNREADABLE)"
FRACTION = "max_unreadable_fraction (DATALOADER.SKIP_UNREADABLE_FRACTION)"


def test_no_image_is_skipped_by_default():
    met = error("a.png")
    with pytest.raises(ImageError) as raised:
        UnreadableImages(0).skip(met)
    assert raised.value is met


def test_images_are_skipped_up_to_the_limit_each_counted_once(caplog):
    unreadable = UnreadableImages(2)
    with caplog.at_level(logging.WARNING, "sasa_det"):
        for name in ("a.png", "a.png", "b.png", "a.png"):
            unreadable.skip(error(name))
    assert caplog.messages == [
        f"Skipped: image a.png is empty; 1 of at most 2 that {LIMIT} allows",
        f"Skipped: image b.png is empty; 2 of at most 2 that {LIMIT} allows",
    ]
    assert unreadable.paths == ["a.png", "b.png"]
    with pytest.raises(DatasetError) as raised:
        unreadable.skip(error("c.png"))
    assert str(raised.value) == (
        f"image c.png is empty, after the 2 that {LIMIT} allows to skip: a.png, b.png"
    )


def test_what_other_processes_skip_counts_too(caplog):
    unreadable = UnreadableImages(3)
    unreadable.skip(error("a.png"))
    assert unreadable.unshared == ["a.png"]
    with caplog.at_level(logging.WARNING, "sasa_det"):
        unreadable.merge(["a.png", "b.png"])
    assert unreadable.paths == ["a.png", "b.png"] and unreadable.unshared == ["a.png"]
    assert caplog.messages[1:] == [
        f"Skipped: image b.png (by another process); 2 of at most 3 that {LIMIT} allows"
    ]
    with pytest.raises(DatasetError, match="d.png .by another process., after the 3 .*a.png, b.pn"):
        unreadable.merge(["c.png", "d.png"])


@pytest.mark.parametrize(
    "limit, fraction, num_images, expected",
    [(0, 0.01, 1_281_167, 12811), (5, 0.01, 300, 5), (2, 0.01, 300, 3), (0, 0.01, 99, 0)],
)
def test_the_larger_of_number_and_fraction_counts(limit, fraction, num_images, expected):
    assert UnreadableImages(limit, fraction=fraction, num_images=num_images).limit == expected


def test_more_than_a_fraction_ends_with_the_list(caplog):
    unreadable = UnreadableImages(1, fraction=0.01, num_images=1299)
    with caplog.at_level(logging.WARNING, "sasa_det"):
        for number in range(12):
            unreadable.skip(error(f"{number}.png"))
        with pytest.raises(DatasetError) as raised:
            unreadable.skip(error("last.png"))
    assert f"; 1 of at most 12 that {FRACTION} 0.01 of 1,299 images allows" in caplog.messages[0]
    names = [f"{number}.png" for number in range(12)]
    assert str(raised.value) == (
        f"image last.png is empty, after the 12 that {FRACTION} 0.01 of 1,299 images allows to "
        f"skip: {', '.join(names[:10])} and 2 more"
    )
    assert caplog.messages[-1].splitlines()[1:] == [*names, "last.png"]


def test_limits_out_of_range_are_refused():
    with pytest.raises(ValueError, match=re.escape(f"{LIMIT} must be >= 0, got -1")):
        UnreadableImages(-1)
    with pytest.raises(ValueError, match=re.escape(f"{FRACTION} must be within [0, 1], got 2")):
        UnreadableImages(0, fraction=2, num_images=10)


class Skipping:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        UnreadableImages(5).skip(error("a.png"))


def test_worker_process_may_not_count():
    with pytest.raises(RuntimeError, match="counts in the training process, not a worker"):
        list(DataLoader(Skipping(), num_workers=1))

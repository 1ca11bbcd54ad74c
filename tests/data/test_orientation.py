"""Orientation by EXIF, in all formats that can carry it: the same pixels and boxes are read."""

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.structures import BoxMode
from PIL import Image, PngImagePlugin

from sasa_det.config import add_sasa_config
from sasa_det.data import (
    ClassificationMapper,
    ImageError,
    build_test_mapper,
    build_train_mapper,
)
from sasa_det.data.images import check_size, read_image

HEIGHT, WIDTH = 32, 48
# An object in no symmetric place; the colours are those of the palette in "palette.tif".
X, Y, BOX_WIDTH, BOX_HEIGHT = 16, 0, 16, 16
UPRIGHT = np.full((HEIGHT, WIDTH, 3), (51, 102, 153), np.uint8)
UPRIGHT[Y : Y + BOX_HEIGHT, X : X + BOX_WIDTH] = (255, 255, 0)
UPRIGHT[16:, :16] = (204, 0, 51)

# Where the first row and the first column of the stored pixels are seen, in the words of EXIF.
STORED = {
    1: UPRIGHT,  # top, left
    2: UPRIGHT[:, ::-1],  # top, right
    3: UPRIGHT[::-1, ::-1],  # bottom, right
    4: UPRIGHT[::-1],  # bottom, left
    5: UPRIGHT.transpose(1, 0, 2),  # left, top
    6: UPRIGHT.transpose(1, 0, 2)[::-1],  # right, top
    7: UPRIGHT.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
    8: UPRIGHT.transpose(1, 0, 2)[:, ::-1],  # left, bottom
}


def xmp(orientation):
    text = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="{orientation}"/></x:xmpmeta>'
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", text)
    return info


# How each is written; what JPEG and AVIF lose is seen in no pixel of such an image.
FORMATS = {
    "a.jpg": {"quality": 100, "subsampling": 0},
    "a.mpo": {"quality": 100, "subsampling": 0, "save_all": True},
    "a.png": {},
    "xmp.png": {},
    "a.webp": {"lossless": True},
    "a.avif": {"quality": 100, "subsampling": "4:4:4"},
    "a.tif": {},
    "lzw.tif": {"compression": "tiff_lzw"},
    "deflate.tiff": {"compression": "tiff_adobe_deflate"},
    "grey.tif": {},
    "palette.tif": {},
}
MODES = {"grey.tif": "L", "palette.tif": "P"}


def write(path, orientation):
    image, options = Image.fromarray(STORED[orientation]), dict(FORMATS[path.name])
    if path.name == "a.mpo":
        options["append_images"] = [image]
    if path.name == "xmp.png":
        options["pnginfo"] = xmp(orientation)
    else:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    image.convert(MODES.get(path.name, "RGB")).save(path, **options)


def config(jitter):
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.INPUT.FORMAT, cfg.INPUT.RANDOM_FLIP = "RGB", "none"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (HEIGHT,), HEIGHT
    cfg.INPUT.JITTER.ENABLED, cfg.INPUT.JITTER.CROP_SIZE = jitter, WIDTH
    cfg.INPUT.JITTER.MIN_SCALE = cfg.INPUT.JITTER.MAX_SCALE = 1.0
    return cfg


def seen(name, pixels):
    mode = MODES.get(name, "RGB")
    return np.asarray(Image.fromarray(pixels).convert(mode).convert("RGB"))


def assert_equal(pixels, expected):
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= 4


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("name", FORMATS)
def test_pixels_and_boxes_are_those_that_are_seen(tmp_path, name, orientation):
    path = tmp_path / name
    write(path, orientation)
    expected, stored = (seen(name, pixels) for pixels in (UPRIGHT, STORED[orientation]))
    record = {"file_name": str(path), "height": HEIGHT, "width": WIDTH}
    annotation = {"bbox": [X, Y, BOX_WIDTH, BOX_HEIGHT], "bbox_mode": BoxMode.XYWH_ABS}
    record["annotations"] = [{**annotation, "category_id": 0, "iscrowd": 0}]

    check_size(str(path), read_image(str(path), 10_000), (HEIGHT, WIDTH))
    with pytest.raises(ImageError, match=f"has {WIDTH} x {HEIGHT} pixels"):
        check_size(str(path), read_image(str(path), 10_000), (WIDTH, HEIGHT))
    for jitter in (False, True):
        mapped = build_train_mapper(config(jitter))(record)
        # Jitter pads below to a square.
        assert_equal(mapped["image"].numpy().transpose(1, 2, 0)[:HEIGHT], expected)
        assert mapped["instances"].gt_boxes.tensor.tolist() == [[16, 0, 32, 16]]
    tested = build_test_mapper(config(False))(record)
    assert_equal(tested["image"].numpy().transpose(1, 2, 0), expected)
    # A class is learned from the stored pixels, as with torchvision's data sets.
    side = min(HEIGHT, WIDTH)
    mapped = ClassificationMapper(is_train=False, crop_size=side, resize_test=side)(
        {**record, "image_id": name, "label": 0}
    )
    top, left = ((length - side) // 2 for length in stored.shape[:2])
    assert_equal(
        mapped["image"].numpy().transpose(1, 2, 0),
        stored[top : top + side, left : left + side],
    )

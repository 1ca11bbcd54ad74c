"""Images of more than 8 bits are refused in all formats that hold them; those of 8 are read."""

import struct

import cv2
import numpy as np
import pytest
from detectron2.config import get_cfg
from PIL import Image

from sasa_det.config import add_sasa_config
from sasa_det.data import ClassificationMapper, ImageError, build_test_mapper, build_train_mapper
from sasa_det.data.images import check_size, read_image

HEIGHT, WIDTH = 40, 60
COLOUR = np.random.default_rng(0).integers(0, 2**16, (HEIGHT, WIDTH, 3), dtype=np.uint16)
GREY = np.ascontiguousarray(COLOUR[..., 0])


def opencv(pixels, *options):
    return lambda path: cv2.imwrite(str(path), pixels, options)


def pillow(pixels, **options):
    return lambda path: Image.fromarray(pixels).save(path, **options)


def portable(kind, maximum, pixels):
    """Write a binary PPM or PGM file, whose two bytes of a number begin with the higher one."""
    header = f"{kind}\n{WIDTH} {HEIGHT}\n{maximum}\n".encode()
    return lambda path: path.write_bytes(header + pixels.astype(">u2").tobytes())


def bands_apart(bits):
    """Write a TIFF file of a plane for each of three colours."""
    pixels = (COLOUR >> (16 - bits)).astype(f"<u{bits // 8}")
    size = pixels[..., 0].nbytes
    data = pixels.transpose(2, 0, 1).tobytes()
    # Behind the header and the entries: three numbers of bits, three offsets, three sizes.
    end = 8 + 2 + 9 * 12 + 4
    entries = [
        (256, 3, 1, WIDTH),
        (257, 3, 1, HEIGHT),
        (258, 3, 3, end),
        (259, 3, 1, 1),  # no compression
        (262, 3, 1, 2),  # RGB
        (273, 4, 3, end + 6),
        (277, 3, 1, 3),
        (279, 4, 3, end + 18),
        (284, 3, 1, 2),  # planes
    ]
    offsets = [end + 30 + number * size for number in range(3)]
    content = struct.pack("<2sHIH", b"II", 42, 8, 9)
    content += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    content += struct.pack("<3H3I3I", bits, bits, bits, *offsets, size, size, size)
    return lambda path: path.write_bytes(content + data)


def bitmap(path):
    """Write a BMP file of 5, 6 and 5 bits for the colours."""
    header = struct.pack("<2sIII", b"BM", 66 + 2 * WIDTH * HEIGHT, 0, 66)
    header += struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, 16, 3, 2 * GREY.size, 0, 0, 0, 0)
    path.write_bytes(header + struct.pack("<III", 0xF800, 0x7E0, 0x1F) + GREY.tobytes())


def surface(pixel_format, *, header=b"", size=4 * WIDTH * HEIGHT):
    """Write a DDS file of a pixel format."""
    start = struct.pack("<4s7I44x", b"DDS ", 124, 0x1007, HEIGHT, WIDTH, 0, 0, 0)
    content = start + struct.pack("<2I4s5I", 32, *pixel_format) + bytes(20) + header + bytes(size)
    return lambda path: path.write_bytes(content)


def masks(*colours):
    return surface((0x40, bytes(4), 32, *colours, 0))


def blocks(number):
    """Compressed blocks of 4 x 4 pixels in one of DirectX' formats."""
    header = struct.pack("<5I", number, 3, 0, 1, 0)
    return surface((4, b"DX10", 0, 0, 0, 0, 0), header=header, size=WIDTH * HEIGHT)


DEEP = {
    "colour.png": opencv(COLOUR),
    "grey.png": opencv(GREY),
    "colour.tif": opencv(COLOUR),
    "raw.tif": opencv(COLOUR, cv2.IMWRITE_TIFF_COMPRESSION, 1),
    "planes.tif": bands_apart(16),
    "grey.tif": opencv(GREY),
    "int32.tif": pillow(GREY.astype(np.int32)),
    "float.tif": pillow(GREY.astype(np.float32)),
    "colour.ppm": opencv(COLOUR),
    "text.ppm": opencv(COLOUR, cv2.IMWRITE_PXM_BINARY, 0),
    "10bits.ppm": portable("P6", 1023, COLOUR >> 6),
    "9bits.ppm": portable("P6", 256, COLOUR >> 8),
    "grey.pgm": opencv(GREY),
    "text.pgm": opencv(GREY, cv2.IMWRITE_PXM_BINARY, 0),
    "12bits.pgm": portable("P5", 4095, GREY >> 4),
    "float.pfm": pillow(GREY.astype(np.float32)),
    "colour.jp2": opencv(COLOUR),
    "grey.jp2": opencv(GREY),
    "10bits.avif": opencv(COLOUR >> 6, cv2.IMWRITE_AVIF_DEPTH, 10),
    "12bits.avif": opencv(COLOUR >> 4, cv2.IMWRITE_AVIF_DEPTH, 12),
    "colour.sgi": pillow((COLOUR >> 8).astype(np.uint8), bpc=2),
    "10bits.dds": masks(0x3FF, 0xFFC00, 0x3FF00000),
    "half.dds": blocks(95),  # BC6H
}
BYTES = (COLOUR >> 8).astype(np.uint8)
OF_8_BITS = {
    "a.png": pillow(BYTES),
    "a.tif": pillow(BYTES),
    "planes.tif": bands_apart(8),
    "a.ppm": pillow(BYTES),
    "text.ppm": opencv(BYTES, cv2.IMWRITE_PXM_BINARY, 0),
    "a.pgm": pillow(BYTES[..., 0]),
    "a.pbm": pillow(BYTES[..., 0] > 127),
    "a.jp2": opencv(BYTES),
    "a.j2k": pillow(BYTES),
    "a.avif": pillow(BYTES),
    "a.sgi": pillow(BYTES),
    "565.bmp": bitmap,
    "a.bmp": pillow(BYTES),
    "a.dds": masks(0xFF, 0xFF00, 0xFF0000),
    "blocks.dds": blocks(98),  # BC7
    "a.webp": pillow(BYTES),
    "a.gif": pillow(BYTES),
}


def detection_mappers():
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (HEIGHT,), HEIGHT
    yield build_test_mapper(cfg)
    for cfg.INPUT.JITTER.ENABLED in (False, True):
        yield build_train_mapper(cfg)


def record(path):
    size = {"height": HEIGHT, "width": WIDTH}
    return {"file_name": str(path), **size, "annotations": [], "image_id": 0, "label": 0}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_are_refused(tmp_path, name):
    path = tmp_path / name
    DEEP[name](path)
    readers = [*detection_mappers(), ClassificationMapper(is_train=True)]
    readers.append(lambda record: read_image(record["file_name"], 10_000))
    for read in readers:
        with pytest.raises(ImageError) as error:
            read(record(path))
        assert str(error.value) == (
            f"image {path} has pixels of more than 8 bits, which would be cut down to 8: convert "
            "it to 8 bits first"
        )


@pytest.mark.parametrize("name", OF_8_BITS)
def test_8_bits_are_read(tmp_path, name):
    path = tmp_path / name
    OF_8_BITS[name](path)
    check_size(str(path), read_image(str(path), 10_000), (HEIGHT, WIDTH))
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))[..., ::-1]
    test, *train = detection_mappers()
    pixels = test(record(path))["image"].numpy().transpose(1, 2, 0)
    assert np.array_equal(pixels, expected)
    for mapper in (*train, ClassificationMapper(is_train=False)):
        assert mapper(record(path))["image"].shape[0] == 3

"""Reading images: looked at before they are decoded, and every failure told with the path."""

import logging
import os
from contextlib import contextmanager

from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError
from torch.utils.data import get_worker_info
from torchvision.datasets.folder import pil_loader

from ..wording import first_of
from .errors import DatasetError, ImageError

__all__ = [
    "UnreadableImages",
    "check_image",
    "check_pixels",
    "pixel_limit",
    "read_rgb",
    "unreadable",
]

logger = logging.getLogger(__name__)

# Pillow's modes of more than 8 bits, which it clips to 0..255 in a conversion to RGB.
_DEEP_MODES = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")
_SHOWN = 10


def check_image(path, max_pixels):
    """Check an image by its header, before any pixel is decoded.

    Args:
        path (str): the image file.
        max_pixels (int): largest product of height and width.

    Raises:
        ImageError: the file is missing or no image, it has more pixels, or pixels of more than 8
            bits, which a conversion to RGB would clip or cut, or it is a PostScript program.
    """
    # Without Pillow's own limit the size can be told, and a higher `max_pixels` has its way.
    with _told(path), pixel_limit(None), PathManager.open(path, "rb") as file:
        with Image.open(file) as image:
            (width, height), mode, kind = image.size, image.mode, image.format
            # Of colours of 16 bits Pillow says so in how they are stored alone.
            is_deep = mode in _DEEP_MODES or ";16" in str([tile[3] for tile in image.tile])
    if kind == "EPS":
        # Pillow runs it through Ghostscript, where there is one: an image is no program.
        raise ImageError(f"image {path} is a PostScript program, which is never run", path)
    if width * height > max_pixels:
        raise ImageError(
            f"image {path} has {width} x {height} pixels, more than the {max_pixels:,} that "
            "INPUT.MAX_PIXELS allows",
            path,
        )
    if is_deep:
        raise ImageError(
            f"image {path} has pixels of more than 8 bits, which would be cut down to 8: convert "
            "it to 8 bits first",
            path,
        )


def check_pixels(path, max_pixels, *, size=None, image_format="RGB"):
    """Check an image by decoding all of it, as training does.

    Args:
        path (str): the image file.
        max_pixels (int): see `check_image`.
        size (tuple[int, int] or None): the height and width that it must have, orientation by EXIF
            applied; None for any.
        image_format (str): as `INPUT.FORMAT`.

    Raises:
        ImageError: as `check_image`, or the file is truncated or broken, or of another size.
    """
    check_image(path, max_pixels)
    with _told(path), pixel_limit(max_pixels):
        height, width = read_image(path, image_format).shape[:2]
    if size is not None and size != (height, width):
        raise ImageError(
            f"image {path} has {width} x {height} pixels, but its annotations are for "
            f"{size[1]} x {size[0]}",
            path,
        )


def read_rgb(path, max_pixels):
    """Read an image as torchvision's data sets do, which leave its orientation by EXIF alone.

    Args:
        path (str): the image file.
        max_pixels (int): see `check_image`.

    Returns:
        PIL.Image.Image: in RGB; other modes are converted.

    Raises:
        ImageError: as `check_image`, or the file is truncated or broken.
    """
    check_image(path, max_pixels)
    with _told(path), pixel_limit(max_pixels):
        return pil_loader(path)


@contextmanager
def pixel_limit(max_pixels):
    """Set Pillow's own limit on pixels, which holds for the whole process, in a block."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def unreadable(path, error):
    """Return the ImageError that tells, with the path, why an image could not be read.

    Args:
        path (str): the image file.
        error (Exception): what reading raised.
    """
    if isinstance(error, FileNotFoundError):
        return ImageError(f"image {path} does not exist", path)
    if isinstance(error, UnidentifiedImageError):
        empty = os.path.isfile(path) and os.path.getsize(path) == 0
        return ImageError(f"image {path} is {'empty' if empty else 'no image'}", path)
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ImageError(f"image {path} cannot be read: {reason.splitlines()[0]}", path)


@contextmanager
def _told(path):
    try:
        yield
    # Over a broken file Pillow's many plugins raise almost anything, SyntaxError among it.
    except Exception as error:
        raise unreadable(path, error) from error


class UnreadableImages:
    """The images that training goes on without, up to a limit.

    Reading happens in worker processes, counting in the training process: a worker returns the
    errors it met beside the sample that stands in, and the training process passes each of them to
    `skip`. So images are counted and logged in one place with any number of workers, and what ends
    the run is the error itself, not torch's report of a worker's traceback.

        # in the worker                        # in the training process
        errors = []                            for errors, sample in batch:
        while True:                                for error in errors:
            try:                                       unreadable_images.skip(error)
                return errors, mapper(record)
            except ImageError as error:
                errors.append(error)
            record = ...  # another one

    Where several processes train, each tells the others what it has `unshared`, so that all of them
    count all images.
    """

    def __init__(self, limit, *, fraction=0.0, num_images=0):
        """
        Args:
            limit (int): `DATALOADER.SKIP_UNREADABLE`; 0 skips none.
            fraction (float): `DATALOADER.SKIP_UNREADABLE_FRACTION`, which counts if that is more.
            num_images (int): images of the training data.

        Raises:
            ValueError: the limit is negative, or the fraction not within [0, 1].
        """
        if limit < 0:
            raise ValueError(f"DATALOADER.SKIP_UNREADABLE must be >= 0, got {limit}")
        if not 0 <= fraction <= 1:
            raise ValueError(
                f"DATALOADER.SKIP_UNREADABLE_FRACTION must be within [0, 1], got {fraction}"
            )
        share = int(fraction * num_images)
        self.limit = max(limit, share)
        self.source = "DATALOADER.SKIP_UNREADABLE"
        if share > limit:
            self.source += f"_FRACTION {fraction:g} of {num_images:,} images"
        self.paths, self.unshared = [], []

    def skip(self, error):
        """Log and count an image if it is a new one; to be called in the training process.

        Args:
            error (ImageError): what reading the image raised.

        Raises:
            ImageError: the same, if no image may be skipped.
            DatasetError: it is one image too many; the message lists the first ones and the log
                all of them.
        """
        if get_worker_info() is not None:
            raise RuntimeError("UnreadableImages.skip counts in the training process, not a worker")
        if self.limit == 0:
            raise error
        if error.path not in self.paths:
            self._count(error.path, error)
            self.unshared.append(error.path)

    def merge(self, paths):
        """Count what other processes have skipped.

        Args:
            paths (sequence[str]): the image files.

        Raises:
            DatasetError: as `skip`.
        """
        for path in paths:
            if path not in self.paths:
                self._count(path, f"image {path} (by another process)")

    def _count(self, path, message):
        if len(self.paths) == self.limit:
            lines = "\n".join([*self.paths, path])
            logger.error("Unreadable images, of which the last is one too many:\n%s", lines)
            raise DatasetError(
                f"{message}, after the {self.limit} that {self.source} allows to skip: "
                f"{first_of(self.paths, _SHOWN)}"
            )
        self.paths.append(path)
        logger.warning(
            "Skipped: %s (%d of at most %d, %s)", message, len(self.paths), self.limit, self.source
        )

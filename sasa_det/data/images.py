"""Image files: found in their folder, looked at, and read."""

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import BinaryIO

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE
from torch.utils.data import get_worker_info

from ..errors import DatasetError, ImageError
from ..utils.text import abbreviated_list

logger = logging.getLogger(__name__)

# Default of INPUT.MAX_PIXELS.
MAX_PIXELS = 100_000_000

# More pixels than any header can give: the size itself is asked for.
_ANY_SIZE = 2**62

# Pillow's modes of more than 8 bits, which it clips to 0..255 in a conversion to RGB.
_DEEP_MODES = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")

_SHOWN = 10


def read_image(path: str, max_pixels: int, image_format: str = "RGB") -> np.ndarray:
    """Read an image as detectron2 does, after a look at its header, and turn it as EXIF says.

    Args:
        path: the image file.
        max_pixels: largest product of height and width.
        image_format: as ``INPUT.FORMAT``.

    Returns:
        numpy.ndarray: (H, W, C), uint8 unless the format is YUV.

    Raises:
        ImageError: if the file is missing, truncated, broken, no image or a PostScript program, or
            has more pixels, or those of more than 8 bits, which a conversion to RGB would clip.
    """
    with _opened(path, max_pixels) as image:
        # Pillow turns a TIFF while it decodes it, and its orientation is gone then. detectron2 asks
        # for the orientation before.
        image.load()
        image = detection_utils._apply_exif_orientation(image)
        return detection_utils.convert_PIL_to_numpy(image, image_format)


def image_size(path: str) -> tuple[int, int]:
    """Read the (width, height) of an image from its header, turned as :func:`read_image` does.

    Raises:
        ImageError: as :func:`read_image`, but for what only decoding shows.
    """
    with _opened(path, _ANY_SIZE) as image:
        # Of a TIFF, Pillow gives the size of the turned image.
        turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation)
        return image.size[::-1] if turned in (5, 6, 7, 8) else image.size


def check_size(path: str, image: np.ndarray, size: tuple[int, int] | None) -> None:
    """Raise ImageError if the pixels of an image are not of the height and width given."""
    height, width = image.shape[:2]
    if size is not None and size != (height, width):
        raise ImageError(
            f"image {path} has {width} x {height} pixels, but its annotations are for "
            f"{size[1]} x {size[0]}",
            path,
        )


def read_rgb(path: str, max_pixels: int) -> Image.Image:
    """Read an image in RGB as torchvision does, which leaves its orientation by EXIF alone.

    Arguments and errors are those of :func:`read_image`.
    """
    with _opened(path, max_pixels) as image:
        if image.format == "TIFF":
            # Pillow would turn it, unlike all other formats, while it decodes it.
            image.getexif()[ExifTags.Base.Orientation] = 1
        return image.convert("RGB")


@contextmanager
def _opened(path: str, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image to be decoded in a block; what is wrong with its header is raised before."""
    try:
        # Without Pillow's own limit the message has the size, and `max_pixels` may be higher.
        with pixel_limit(None), PathManager.open(path, "rb") as file, Image.open(file) as image:
            _check_header(path, image, file, max_pixels)
            with pixel_limit(max_pixels):
                yield image
    except ImageError:
        raise
    # Over a broken file Pillow's many plugins raise almost anything, SyntaxError among it.
    except Exception as error:
        raise _unreadable(path, error) from error


def _check_header(path: str, image: Image.Image, file: BinaryIO, max_pixels: int) -> None:
    width, height = image.size
    if image.format == "EPS":
        # Pillow runs it through Ghostscript, where there is one: an image is not a program.
        raise ImageError(f"image {path} is a PostScript program, which is never run", path)
    if width * height > max_pixels:
        raise ImageError(
            f"image {path} has {width} x {height} pixels, more than the {max_pixels:,} that "
            "max_pixels (INPUT.MAX_PIXELS) allows",
            path,
        )
    if _is_deep(image, file):
        raise ImageError(
            f"image {path} has pixels of more than 8 bits, which would be cut down to 8: convert "
            "it to 8 bits first",
            path,
        )


def _is_deep(image: Image.Image, file: BinaryIO) -> bool:
    """Return whether pixels have more than 8 bits, which Pillow cuts down to 8 in these formats."""
    match image.format:
        case "PPM":
            arguments = image.tile[0].args
            is_deep = isinstance(arguments, tuple) and arguments[1] > 255
        case "PNG" | "SGI":
            is_deep = "16" in str([(tile.codec_name, tile.args) for tile in image.tile])
        case "TIFF":
            is_deep = max(image.tag_v2.get(BITSPERSAMPLE, (1,))) > 8
        case "DDS":
            codec, *_, arguments = image.tile[0]
            is_deep = codec == "bcn" and arguments[1].startswith("BC6H")
            is_deep |= codec == "dds_rgb" and max(map(int.bit_count, arguments[1])) > 8
        case "JPEG2000":
            # Each component has three bytes at the end of the first segment of the codestream.
            segment = _content(file).partition(b"\xff\x4f\xff\x51")[2]
            sizes = segment[38 : int.from_bytes(segment[:2]) : 3]
            is_deep = any((size & 0x7F) + 1 > 8 for size in sizes)
        case "AVIF":
            # Each configuration of the codec has a flag for 10 or 12 bits.
            configurations = _content(file).split(b"av1C")[1:]
            is_deep = any(part[2:3] and part[2] & 0x40 for part in configurations)
        case _:
            is_deep = False
    return is_deep or image.mode in _DEEP_MODES


def _content(file: BinaryIO) -> bytes:
    position = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(position)
    return content


@contextmanager
def pixel_limit(max_pixels: int | None) -> Iterator[None]:
    """Set Pillow's own limit on pixels, which holds for the whole process, in a block."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _unreadable(path: str, error: Exception) -> ImageError:
    if isinstance(error, FileNotFoundError):
        return ImageError(f"image {path} does not exist", path)
    if isinstance(error, UnidentifiedImageError):
        empty = os.path.isfile(path) and os.path.getsize(path) == 0
        return ImageError(f"image {path} is {'empty' if empty else 'not an image'}", path)
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ImageError(f"image {path} cannot be read: {reason.splitlines()[0]}", path)


class UnreadableImages:
    """The images that training goes on without, up to a limit.

    Workers return the errors that they met, and the training process passes each to :meth:`skip`.
    So images are counted and logged in one place with any number of workers, and what ends the run
    is the error itself, not torch's report of a worker's traceback. Where several processes train,
    each shares what it has in ``unshared``, so that all of them count all images.
    """

    def __init__(self, limit: int, *, fraction: float = 0.0, num_images: int = 0):
        """Allow the limit, or a fraction of the images of the training data if that is more."""
        if limit < 0:
            raise ValueError(
                f"max_unreadable (DATALOADER.SKIP_UNREADABLE) must be >= 0, got {limit}"
            )
        if not 0 <= fraction <= 1:
            raise ValueError(
                "max_unreadable_fraction (DATALOADER.SKIP_UNREADABLE_FRACTION) must be within "
                f"[0, 1], got {fraction}"
            )
        share = int(fraction * num_images)
        self.limit = max(limit, share)
        self.source = "max_unreadable (DATALOADER.SKIP_UNREADABLE)"
        if share > limit:
            self.source = (
                "max_unreadable_fraction (DATALOADER.SKIP_UNREADABLE_FRACTION) "
                f"{fraction:g} of {num_images:,} images"
            )
        self.paths: list[str] = []
        self.unshared: list[str] = []

    def skip(self, error: ImageError) -> None:
        """Log and count an image if it is a new one; to be called in the training process.

        Raises:
            ImageError: the same, if no image may be skipped.
            DatasetError: if it is one image too many; the log lists all of them.
        """
        if get_worker_info() is not None:
            raise RuntimeError("UnreadableImages.skip counts in the training process, not a worker")
        if self.limit == 0:
            raise error
        if self._count(error.path, error):
            self.unshared.append(error.path)

    def merge(self, paths: Sequence[str]) -> None:
        """Count the image files that other processes have skipped, as :meth:`skip` does."""
        for path in paths:
            self._count(path, f"image {path} (by another process)")

    def _count(self, path: str, message: object) -> bool:
        if path in self.paths:
            return False
        if len(self.paths) == self.limit:
            lines = "\n".join([*self.paths, path])
            logger.error("Unreadable images, of which the last is one too many:\n%s", lines)
            raise DatasetError(
                f"{message}, after the {self.limit} that {self.source} allows to skip: "
                f"{abbreviated_list(self.paths, _SHOWN)}"
            )
        self.paths.append(path)
        logger.warning(
            "Skipped: %s; %d of at most %d that %s allows",
            message,
            len(self.paths),
            self.limit,
            self.source,
        )
        return True


def check_image_files(
    image_root: str | os.PathLike, file_names: Mapping[int, str]
) -> Iterator[tuple[int, bool, str]]:
    """Look for image files, and for names that lead out of their folder.

    Folders are listed once, which is much cheaper than to ask for every image.

    Args:
        image_root: the folder that the names are relative to.
        file_names: names by any key.

    Yields:
        tuple: of each file that cannot be used the key, whether it is unsafe, not missing, and why.
    """
    root = os.path.realpath(image_root)
    listed = cache(_listed)
    for key, name in file_names.items():
        path = os.path.join(image_root, name)
        folder, base = os.path.split(path)
        reason = _unsafe_name(name)
        if reason is None:
            problems, missing = listed(folder, root)
            reason = "leads out of the image folder" if problems is None else None
        if reason:
            yield key, True, f"file_name {name!r} {reason}"
        elif problem := problems.get(base, (False, missing)):
            is_unsafe, clause = problem
            yield key, is_unsafe, f"{path!r} {clause}"


def _listed(folder: str, root: str) -> tuple[dict[str, tuple[bool, str] | None] | None, str]:
    """Return what is wrong with the files of a folder by name, and with names that are not in it.

    The first is None for a folder that is not in the root.
    """
    missing = "does not exist"
    if not is_inside(os.path.realpath(folder), root):
        return None, missing
    try:
        with os.scandir(folder) as entries:
            return {entry.name: _file_problem(entry, root) for entry in entries}, missing
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        missing = f"cannot be looked for: {error.strerror}"
    return {}, missing


def _unsafe_name(name: str) -> str | None:
    """Return why a name is refused whatever the files are, or None."""
    if os.path.isabs(name):
        return "is absolute; it must be relative to the image folder"
    if os.path.normpath(name).split(os.sep)[0] == os.pardir:
        return "leads out of the image folder"
    try:
        if b"\0" not in os.fsencode(name):
            return None
    except UnicodeEncodeError:
        pass
    return "is not possible for a file"


def _file_problem(entry: os.DirEntry, root: str) -> tuple[bool, str] | None:
    if clause := link_out(entry, [root]):
        return True, clause
    # What a plain file needs is known from the listing: only links take further calls.
    if entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path):
        return None
    return False, "is not a regular file"


def link_out(entry: os.DirEntry, folders: Collection[str]) -> str | None:
    """Return a clause about an entry that is a link out of all of the folders, which are real."""
    if entry.is_symlink():
        target = os.path.realpath(entry.path)
        if not any(is_inside(target, folder) for folder in folders):
            return f"is a link to {target!r}, out of the image folder"
    return None


def is_inside(path: str, root: str) -> bool:
    """Return whether a path is a folder or in it; both are real paths."""
    return path == root or path.startswith(os.path.join(root, ""))

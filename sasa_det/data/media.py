"""Images and videos to predict on: found by name, read one image after the other."""

import glob
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from detectron2.utils.file_io import PathManager
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import ImageError, UsageError
from .images import check_image_files, read_image

IMAGE_SUFFIXES = frozenset((*IMG_EXTENSIONS, ".avif", ".gif", ".jfif", ".jp2"))

VIDEO_SUFFIXES = frozenset(
    (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv")
)

# Of a video whose file does not say how many images it shows in a second.
_USUAL_FPS = 25.0


@dataclass(frozen=True)
class Medium:
    """An image or a video.

    Attributes:
        path: of the file.
        name: what it is called in results: its path in the folder that was given, or its name.
        image_id: of an image of a COCO data set; None for others.
    """

    path: str
    name: str
    image_id: int | None = None

    @property
    def is_video(self) -> bool:
        return Path(self.path).suffix.lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class Frame:
    """An image that was read, which may be one of a video.

    Attributes:
        medium: where it comes from.
        index: of the image in its video, from 0; None for an image file.
        image: (H, W, 3) uint8, BGR.
        fps: images in a second of its video.
    """

    medium: Medium
    index: int | None
    image: np.ndarray
    fps: float = 0.0


def find_media(words: Sequence[str], leave_out: str | os.PathLike | None = None) -> list[Medium]:
    """Find the images and videos that words of a command line name.

    Args:
        words: files, folders, whose images are looked for at any depth, and glob patterns, in which
            ``**`` stands for folders of any depth.
        leave_out: a folder that is not looked into, as the one of the output.

    Returns:
        list[Medium]: each file once, in the order of the words and in that of the names.

    Raises:
        UsageError: if a word names nothing, or a folder without images.
    """
    excluded = None if leave_out is None else os.path.realpath(leave_out)
    found: dict[str, Medium] = {}
    for word in words:
        # A file may have a name that looks like a pattern.
        matches = [word] if os.path.lexists(word) else sorted(glob.glob(word, recursive=True))
        if not matches:
            kind = "matches no file" if glob.has_magic(word) else "does not exist"
            raise UsageError(f"input {word!r} {kind}.")
        media = [medium for path in matches for medium in _media_at(path, excluded)]
        if not media:
            kind = "folder" if os.path.isdir(word) else "pattern"
            raise UsageError(
                f"input {kind} {word!r} has no images, which end in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}; videos are given by their names."
            )
        for medium in media:
            found.setdefault(os.path.realpath(medium.path), medium)
    return list(found.values())


def _media_at(path: str, excluded: str | None) -> Iterator[Medium]:
    if not os.path.isdir(path):
        yield Medium(path, os.path.basename(path))
        return
    for folder, names, files in os.walk(path):
        names[:] = sorted(
            name
            for name in names
            if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) != excluded
        )
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                file = os.path.join(folder, name)
                yield Medium(file, os.path.relpath(file, path))


def count_images(medium: Medium) -> int:
    """Return how many images a medium has, as far as the file of a video tells; at least 1."""
    if not medium.is_video:
        return 1
    video = cv2.VideoCapture(medium.path)
    try:
        return max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 1)
    finally:
        video.release()


def read_frames(medium: Medium, max_pixels: int) -> Iterator[Frame]:
    """Read an image as in training, or the images of a video one after the other.

    Args:
        medium: to read.
        max_pixels: largest product of height and width of an image file.

    Raises:
        ImageError: if it cannot be read, or a video has no image that can.
    """
    if not medium.is_video:
        yield Frame(medium, None, read_image(medium.path, max_pixels, "BGR"))
        return
    if not os.path.isfile(medium.path):
        raise ImageError(f"video {medium.path} is not a file", medium.path)
    video = cv2.VideoCapture(medium.path)
    index = 0
    try:
        fps = video.get(cv2.CAP_PROP_FPS)
        fps = fps if 0 < fps < 1000 else _USUAL_FPS
        while True:
            is_read, image = video.read()
            if not is_read:
                break
            yield Frame(medium, index, image, fps)
            index += 1
    finally:
        video.release()
    if index == 0:
        raise ImageError(f"video {medium.path} cannot be read by OpenCV", medium.path)


def media_of_coco(
    json_file: str | os.PathLike, image_root: str | os.PathLike
) -> tuple[list[Medium], dict[str, int]]:
    """List the images of a COCO json, which needs no annotations.

    Args:
        json_file, image_root: the json and the folder of its images.

    Returns:
        tuple: the images, and the ids of the categories by name.

    Raises:
        UsageError: if a file is missing, the json has no images with ids and file names, or a name
            leads out of the folder.
    """
    try:
        with open(PathManager.get_local_path(os.fspath(json_file)), encoding="utf-8") as file:
            content = json.load(file)
        images = {image["id"]: image["file_name"] for image in content["images"]}
        ids = {entry["name"]: entry["id"] for entry in content.get("categories", ())}
    except OSError as error:
        raise UsageError(f"{json_file} cannot be read: {error.strerror}.") from error
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UsageError(
            f"{json_file} is not a COCO json of images with an id and a file_name: "
            f"{type(error).__name__}: {error}."
        ) from error
    if not all(type(identity) is int for identity in (*images, *ids.values())):
        raise UsageError(f"{json_file}: the ids of images and categories must be integers.")
    if not images or not all(isinstance(name, str) for name in (*images.values(), *ids)):
        raise UsageError(f"{json_file} has no images, or names that are not text.")
    if not os.path.isdir(image_root):
        raise UsageError(f"image folder {image_root} does not exist.")
    for _, is_unsafe, reason in check_image_files(image_root, images):
        if is_unsafe:
            raise UsageError(f"{json_file}: {reason}.")
    media = [Medium(os.path.join(image_root, name), name, key) for key, name in images.items()]
    return media, ids

"""Real handwritten digits: images to detect them in, and single ones to classify."""

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from PIL import Image
from pycocotools.mask import iou
from tqdm import tqdm

from ..errors import DatasetError
from ..utils.files import holds_anything, write_folder_once
from .catalog import SPLITS, builtin_path, is_registered
from .digit_drawing import (
    DIGIT_NAMES,
    HEIGHT_RANGE,
    draw_background,
    load_digits,
    paint,
    scaled_ink,
    split_digits,
)
from .image_folder import register_class_folders

logger = logging.getLogger(__name__)

# Raised whenever the same parameters give other images, so that an older folder is not reused.
GENERATOR_VERSION = 1

DIGITS_PER_IMAGE = (2, 5)
MAX_IOU = 0.05
PLACEMENT_ATTEMPTS = 60

# Of the images to classify, in pixels. Their digits are the larger ones of the detection set, whose
# images have twice the side.
CROP_SIZE = 64
CROP_HEIGHTS = (36, 60)


def _write_once(
    root: str | os.PathLike,
    kind: str,
    info_file: str,
    write_images: Callable[[Path, dict[str, int]], None],
    **with_minimum: tuple[int, int],
) -> Path:
    """Write a set beside ``root`` and rename it, or reuse it where it is there.

    So it is there whole or not at all, also when several processes write it at the same time. The
    parameters that it was made from are in its info file, under "info".
    """
    parameters = {}
    for name, (value, least) in with_minimum.items():
        if type(value) is not int or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        parameters[name] = value
    parameters["version"] = GENERATOR_VERSION
    root = Path(root)
    if not holds_anything(root):
        logger.info("Writing the %s to %s: %s", kind, root, parameters)
        if write_folder_once(root, lambda staging: write_images(staging, parameters)):
            return root
        logger.info("Another process has written %s meanwhile: using that", root)
    try:
        found = json.loads((root / info_file).read_text())["info"]["parameters"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{root} is not a {kind} ({type(error).__name__} reading {info_file}): "
            "name a folder that does not exist"
        ) from error
    if found != parameters:
        raise DatasetError(
            f"{root} was written with {found}, not with the requested {parameters}: "
            "name another folder or remove this one"
        )
    return root


def _if_tuning(tuning: int) -> dict[str, tuple[int, int]]:
    # Folders of other sets do not tell of it.
    return {} if type(tuning) is int and tuning == 0 else {"tuning": (tuning, 1)}


def _planned_images(
    parameters: dict[str, int], first_id: int
) -> Iterator[tuple[str, np.ndarray, int, np.random.Generator]]:
    """Yield split, indices of its digits, id and random numbers of each image, with progress."""
    counts = [parameters[f"num_{split}"] for split in SPLITS]
    with tqdm(total=sum(counts), desc="Images of digits", unit=" images") as progress:
        splits = split_digits(parameters["seed"], tuning=bool(parameters.get("tuning")))
        for number, candidates in enumerate(splits):
            for image_id in range(first_id, first_id + counts[number]):
                # Seeded by image, so that a smaller set is the beginning of a larger one.
                rng = np.random.default_rng([parameters["seed"], number, image_id])
                yield SPLITS[number], candidates, image_id, rng
                progress.update()


def _save_image(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=1)


def write_digits(
    root: str | os.PathLike,
    *,
    num_train: int = 1200,
    num_val: int = 200,
    image_size: int = 128,
    seed: int = 0,
    tuning: int = 0,
) -> Path:
    """Write the digits detection set as PNG images and COCO json, or reuse it where it is there.

    The folder holds ``train.json``, ``val.json``, ``train/*.png`` and ``val/*.png``, whole or not
    at all. The same arguments give the same bytes on the same library versions.

    Args:
        root: the folder to write, which is returned.
        num_train, num_val: images for training and validation, at least 1.
        image_size: height and width of the images in pixels, at least 64.
        seed: of the split of the digits and of every image, not negative.
        tuning: 1 draws all images from the training digits of the same seed, for validation those
            that are held out of training; 0 does not.

    Raises:
        ValueError: if an argument is out of range.
        DatasetError: if ``root`` holds something else than this set.
    """
    return _write_once(
        root,
        "digits detection set",
        "val.json",
        _write_scenes,
        num_train=(num_train, 1),
        num_val=(num_val, 1),
        image_size=(image_size, 64),
        seed=(seed, 0),
        **_if_tuning(tuning),
    )


def register_digits(
    root: str | os.PathLike | None = None, *, name: str = "digits", **parameters: int
) -> None:
    """Register ``{name}_train`` and ``{name}_val`` in detectron2 without writing anything yet.

    The set is written when detectron2 first asks for one of the json files: when it loads a
    data set, or when a ``COCOEvaluator`` is made. Calling this again is harmless.

    Args:
        root: the folder of the set; None means ``name`` under ``$DETECTRON2_DATASETS``.
        name: what the names of the data sets begin with.
        **parameters: arguments of :func:`write_digits`.

    Raises:
        DatasetError: if the names are taken by other data.
    """
    root = os.fspath(builtin_path(name) if root is None else root)
    metadata = {
        "thing_classes": list(DIGIT_NAMES),
        "thing_dataset_id_to_contiguous_id": {digit + 1: digit for digit in range(10)},
        "digits_parameters": parameters,
    }
    for split in SPLITS:
        dataset, json_file = f"{name}_{split}", os.path.join(root, f"{split}.json")
        if not is_registered(dataset, json_file=json_file, digits_parameters=parameters):
            handler = _WriteOnFirstUse(json_file, partial(write_digits, root, **parameters))
            PathManager.register_handler(handler, allow_override=True)
            register_coco_instances(dataset, metadata, json_file, os.path.join(root, split))


class _WriteOnFirstUse(PathHandler):
    """Writes the set when detectron2 opens one of its json files; only that path is handled."""

    def __init__(self, path: str, write: Callable[[], Any]):
        super().__init__()
        self._path, self._write = path, write

    def _get_supported_prefixes(self) -> list[str]:
        return [self._path]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._write()
        return path

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        return open(self._get_local_path(path), mode, buffering, **kwargs)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return os.path.exists(path)

    _isfile = _exists


@dataclass
class Scene:
    """One composed image and what is known about it.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        background: (H, W, 3) uint8 RGB, the image without the digits.
        ink: (n, H, W) bool, the pixels that each digit covers; they are disjoint.
        boxes: (n, 4) int64 X, Y, width and height, tight around the ink.
        digit_indices: (n,) int64, which of scikit-learn's digits was drawn.
    """

    image: np.ndarray
    background: np.ndarray
    ink: np.ndarray
    boxes: np.ndarray
    digit_indices: np.ndarray


def compose_scene(
    digits: np.ndarray, candidates: np.ndarray, image_size: int, rng: np.random.Generator
) -> Scene:
    """Compose an image of the detection set of 2 to 5 digits, whose indices are candidates.

    The digits are (n, 8, 8) float32 ink in 0..1.
    """
    background = draw_background(image_size, rng)
    image = background.copy()
    ink, boxes, indices = [], [], []
    wanted = rng.integers(*DIGITS_PER_IMAGE, endpoint=True)
    occupied = np.zeros((image_size, image_size), dtype=bool)
    for attempt in range(PLACEMENT_ATTEMPTS):
        if len(boxes) == wanted:
            break
        index = int(rng.choice(candidates))
        # Attempts that fail mean that the image is full: the later ones try smaller digits.
        low, high = np.log(np.multiply(HEIGHT_RANGE, image_size))
        height = np.exp(rng.uniform(low, high - (high - low) * attempt / PLACEMENT_ATTEMPTS))
        alpha = scaled_ink(digits[index], height)
        box, window, mask = _draw_place(alpha, image_size, rng)
        ious = iou(np.array([box], float), np.array(boxes, float), [0] * len(boxes)) if boxes else 0
        if (occupied & mask).any() or np.any(ious > MAX_IOU):
            continue
        paint(image, background, window, alpha, rng)
        occupied |= mask
        ink.append(mask)
        boxes.append(box)
        indices.append(index)
    return Scene(image, background, np.stack(ink), np.stack(boxes), np.array(indices))


def _draw_place(
    alpha: np.ndarray, image_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[slice, slice], np.ndarray]:
    """Draw a digit's box (X, Y, width, height), its rows and columns, and the pixels it covers."""
    h, w = alpha.shape
    x, y = (int(rng.integers(0, image_size - side, endpoint=True)) for side in (w, h))
    window = np.s_[y : y + h, x : x + w]
    mask = np.zeros((image_size, image_size), dtype=bool)
    mask[window] = alpha > 0
    return np.array([x, y, w, h]), window, mask


def _write_scenes(folder: Path, parameters: dict[str, int]) -> None:
    digits, labels = load_digits()
    size = parameters["image_size"]
    sections = {split: {"images": [], "annotations": []} for split in SPLITS}
    for split, candidates, image_id, rng in _planned_images(parameters, first_id=1):
        scene = compose_scene(digits, candidates, size, rng)
        file_name = f"{image_id:06d}.png"
        _save_image(scene.image, folder / split / file_name)
        image = {"id": image_id, "file_name": file_name, "height": size, "width": size}
        sections[split]["images"].append(image)
        annotations = sections[split]["annotations"]
        # Floats, because detectron2's transforms round the boxes that are integers down.
        boxes = scene.boxes.astype(float).tolist()
        for box, index in zip(boxes, scene.digit_indices.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(labels[index]) + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "digit_index": index,
                }
            )
    for split in SPLITS:
        info = {
            "description": "Handwritten digits on textured backgrounds",
            "split": split,
            "parameters": parameters,
        }
        categories = [{"id": digit + 1, "name": name} for digit, name in enumerate(DIGIT_NAMES)]
        content = {"info": info, **sections[split], "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))


def write_digit_crops(
    root: str | os.PathLike,
    *,
    num_train: int = 4000,
    num_val: int = 500,
    seed: int = 0,
    tuning: int = 0,
) -> Path:
    """Write the digits classification set as PNG images, or reuse it where it is there.

    The folder holds ``train/CLASS/*.png`` and ``val/CLASS/*.png``, with as many images of each
    class, and ``info.json``, whole or not at all. It shows the digits of the detection set of the
    same seed: those of its validation images are in no training image.

    Arguments and errors are those of :func:`write_digits`, but each split has at least 10 images.
    """
    return _write_once(
        root,
        "digits classification set",
        "info.json",
        _write_crops,
        num_train=(num_train, 10),
        num_val=(num_val, 10),
        seed=(seed, 0),
        **_if_tuning(tuning),
    )


def register_digit_crops(
    root: str | os.PathLike | None = None, *, name: str = "digit_crops", **parameters: int
) -> None:
    """Register ``{name}_train`` and ``{name}_val`` in detectron2 without writing anything yet.

    The set is written when one of them is first loaded. Arguments and errors are those of
    :func:`register_digits`, but the parameters those of :func:`write_digit_crops`.
    """
    root = os.fspath(builtin_path(name) if root is None else root)
    for split in SPLITS:
        register_class_folders(
            f"{name}_{split}",
            os.path.join(root, split),
            class_names=DIGIT_NAMES,
            prepare=partial(write_digit_crops, root, **parameters),
        )


def compose_crop(
    digit: np.ndarray, background: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Compose an image of the classification set: a digit, (8, 8) float32 ink in 0..1, anywhere.

    Returns:
        tuple: the (64, 64, 3) uint8 RGB image, and the (64, 64) bool pixels that the digit covers.
    """
    while True:
        alpha = scaled_ink(digit, np.exp(rng.uniform(*np.log(CROP_HEIGHTS))))
        if max(alpha.shape) <= CROP_SIZE:
            break
    _, window, mask = _draw_place(alpha, CROP_SIZE, rng)
    image = background.copy()
    paint(image, background, window, alpha, rng)
    return image, mask


def _write_crops(folder: Path, parameters: dict[str, int]) -> None:
    digits, labels = load_digits()
    for split, candidates, number, rng in _planned_images(parameters, first_id=0):
        if number % 4 == 0:
            # As in the detection set, which is drawn in twice the size: for four images.
            whole = draw_background(2 * CROP_SIZE, rng)
            quarters = [q for half in np.split(whole, 2) for q in np.split(half, 2, axis=1)]
        label = number % len(DIGIT_NAMES)
        digit = digits[rng.choice(candidates[labels[candidates] == label])]
        image, _ = compose_crop(digit, quarters[number % 4], rng)
        _save_image(image, folder / split / DIGIT_NAMES[label] / f"{number + 1:04d}.png")
    info = {"description": "Handwritten digits, one in each image", "parameters": parameters}
    (folder / "info.json").write_text(json.dumps({"info": info}))

"""Real handwritten digits: images to detect them in, and single ones to classify."""

import json
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
from iopath.common.file_io import PathHandler
from PIL import Image

from ..errors import DatasetError
from .builtin import SPLITS, builtin_path
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

__all__ = [
    "Progress",
    "check_integers",
    "compose_crop",
    "register_digit_crops",
    "register_digits",
    "write_digit_crops",
    "write_digits",
    "write_once",
]

logger = logging.getLogger(__name__)


def check_integers(**arguments):
    """Check that arguments are integers and not too small.

    Args:
        **arguments (tuple[int, int]): the value and the least one allowed, by name.

    Returns:
        dict[str, int]: the values.

    Raises:
        ValueError: one is not as it should be; the message names it.
    """
    for name, (value, least) in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return {name: value for name, (value, _) in arguments.items()}


def write_once(root, kind, info_file, parameters, write):
    """Write a data set to a folder, or reuse it where it is there.

    It is written beside `root` and renamed, so that it is there whole or not at all, also when
    several processes write it at the same time.

    Args:
        root (str or path): the folder.
        kind (str): what is written, for messages.
        info_file (str): the json file in it that holds the parameters, under `info` `parameters`.
        parameters (dict): what the set is made from.
        write (callable): fills an empty folder, given its path and the parameters.

    Returns:
        Path: `root`.

    Raises:
        DatasetError: `root` holds something else than this set.
    """
    root = Path(root)
    if _holds_anything(root):
        _check_parameters(root, kind, info_file, parameters)
        return root

    logger.info("Writing the %s to %s: %s", kind, root, parameters)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as folder:
        # A subfolder, because the temporary folder itself is readable by its owner only.
        staging = Path(folder) / root.name
        staging.mkdir()
        write(staging, parameters)
        try:
            os.rename(staging, root)
        except OSError:
            if not _holds_anything(root):
                raise
            logger.info("Another process has written %s meanwhile: using that", root)
            _check_parameters(root, kind, info_file, parameters)
    return root


def _holds_anything(root):
    # An empty folder may be taken: renaming onto it replaces it.
    if not root.exists():
        return False
    return not root.is_dir() or any(root.iterdir())


def _check_parameters(root, kind, info_file, parameters):
    try:
        found = json.loads((root / info_file).read_text())["info"]["parameters"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{root} is not a {kind} ({error.__class__.__name__} reading {info_file}): "
            "name a folder that does not exist"
        ) from error
    if found != parameters:
        raise DatasetError(
            f"{root} was written with {found}, not with the requested {parameters}: "
            "name another folder or remove this one"
        )


class Progress:
    """Logs how many images are written, and when it will be done, every few seconds."""

    def __init__(self, name, total, every=5.0):
        self.name = name
        self.total = total
        self.every = every
        self.done = 0
        self.start = self.last = time.monotonic()

    def step(self):
        self.done += 1
        now = time.monotonic()
        if self.done == self.total or now - self.last >= self.every:
            self.last = now
            seconds = round((now - self.start) / self.done * (self.total - self.done))
            eta = timedelta(seconds=seconds)
            logger.info("%s: %d of %d images, ETA %s", self.name, self.done, self.total, eta)


# Raised whenever the same parameters give other images, so that an older folder is not reused.
GENERATOR_VERSION = 1

DIGITS_PER_IMAGE = (2, 5)

MAX_IOU = 0.05

PLACEMENT_ATTEMPTS = 60


def write_digits(root, *, num_train=1200, num_val=200, image_size=128, seed=0):
    """Write the digits detection set as PNG images and COCO json, or reuse it where it is there.

    The folder holds `train.json`, `val.json`, `train/*.png` and `val/*.png`. It is written beside
    `root` and renamed, so that it is there whole or not at all, also when several processes write
    it at the same time. The same arguments give the same bytes on the same library versions.

    Args:
        root (str or path): the folder to write.
        num_train (int): training images, >= 1.
        num_val (int): validation images, >= 1.
        image_size (int): height and width of the images in pixels, >= 64.
        seed (int): seed of the split of the digits and of every image, >= 0.

    Returns:
        Path: `root`.

    Raises:
        ValueError: an argument is out of range, or `root` holds something else than this set.
    """
    parameters = check_integers(
        num_train=(num_train, 1), num_val=(num_val, 1), image_size=(image_size, 64), seed=(seed, 0)
    )
    parameters["version"] = GENERATOR_VERSION
    return write_once(root, "digits detection set", "val.json", parameters, _write_splits)


def register_digits(root=None, *, name="digits", **parameters):
    """Register `{name}_train` and `{name}_val` in detectron2 without writing anything yet.

    The set is written when detectron2 first asks for one of the json files: when it loads a
    dataset, or when a `COCOEvaluator` is made. Calling this again is harmless.

    Args:
        root (str or path or None): the folder of the set; None means `digits` under
            `$DETECTRON2_DATASETS`, which is `datasets` unless it is set.
        name (str): what the names of the datasets begin with.
        **parameters: arguments of `write_digits`.

    Raises:
        ValueError: the names are taken by other data.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances
    from detectron2.utils.file_io import PathManager

    root = os.fspath(builtin_path(name) if root is None else root)

    metadata = {
        "thing_classes": list(DIGIT_NAMES),
        "thing_dataset_id_to_contiguous_id": {digit + 1: digit for digit in range(10)},
        "digits_parameters": parameters,
    }
    missing = []
    for split in SPLITS:
        dataset, json_file = f"{name}_{split}", os.path.join(root, f"{split}.json")
        if dataset not in DatasetCatalog:
            missing.append((dataset, json_file, os.path.join(root, split)))
            continue
        known = MetadataCatalog.get(dataset)
        if known.get("json_file") != json_file or known.get("digits_parameters") != parameters:
            raise DatasetError(
                f"dataset {dataset!r} is already registered with json_file "
                f"{known.get('json_file')!r} and parameters {known.get('digits_parameters')}: "
                "give other data another name"
            )
    if missing:
        PathManager.register_handler(_WriteOnFirstUse(root, parameters), allow_override=True)
    for dataset, json_file, image_root in missing:
        register_coco_instances(dataset, metadata, json_file, image_root)


class _WriteOnFirstUse(PathHandler):
    """Writes the set when detectron2 opens one of its json files; only these paths are handled."""

    def __init__(self, root, parameters):
        super().__init__()
        self.root = root
        self.parameters = parameters

    def _get_supported_prefixes(self):
        return [os.path.join(self.root, f"{split}.json") for split in SPLITS]

    def _get_local_path(self, path, force=False, **kwargs):
        self._check_kwargs(kwargs)
        write_digits(self.root, **self.parameters)
        return path

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        return open(self._get_local_path(path), mode, buffering, **kwargs)

    def _exists(self, path, **kwargs):
        return os.path.exists(path)

    _isfile = _exists


@dataclass
class Scene:
    """One composed image and what is known about it.

    Attributes:
        image (ndarray): (H, W, 3) uint8 RGB.
        background (ndarray): (H, W, 3) uint8 RGB, the image without the digits.
        ink (ndarray): (n, H, W) bool, the pixels that each digit covers; they are disjoint.
        boxes (ndarray): (n, 4) int64 X, Y, width and height, tight around the ink.
        digit_indices (ndarray): (n,) int64, which of scikit-learn's digits was drawn.
    """

    image: np.ndarray
    background: np.ndarray
    ink: np.ndarray
    boxes: np.ndarray
    digit_indices: np.ndarray


def compose_scene(digits, candidates, image_size, rng):
    """Compose one image of the set.

    Args:
        digits (ndarray): (n, 8, 8) float32, ink in 0..1.
        candidates (ndarray): (m,) integer, the digits that may be drawn.
        image_size (int): height and width in pixels.
        rng (numpy.random.Generator): the only source of randomness.

    Returns:
        Scene: the image with 2 to 5 digits.
    """
    background = draw_background(image_size, rng)
    image = background.copy()
    ink, boxes, indices = [], [], []
    wanted = rng.integers(DIGITS_PER_IMAGE[0], DIGITS_PER_IMAGE[1], endpoint=True)
    occupied = np.zeros((image_size, image_size), dtype=bool)
    for attempt in range(PLACEMENT_ATTEMPTS):
        if len(boxes) == wanted:
            break
        index = int(rng.choice(candidates))
        # Attempts that fail mean that the image is full: the later ones try smaller digits.
        low, high = np.log(np.multiply(HEIGHT_RANGE, image_size))
        height = np.exp(rng.uniform(low, high - (high - low) * attempt / PLACEMENT_ATTEMPTS))
        alpha = scaled_ink(digits[index], height)
        h, w = alpha.shape
        x, y = (int(rng.integers(0, image_size - side, endpoint=True)) for side in (w, h))
        place = np.s_[y : y + h, x : x + w]
        box = np.array([x, y, w, h])
        if (occupied[place] & (alpha > 0)).any() or any(_iou(box, b) > MAX_IOU for b in boxes):
            continue
        paint(image, background, place, alpha, rng)
        mask = np.zeros_like(occupied)
        mask[place] = alpha > 0
        occupied |= mask
        ink.append(mask)
        boxes.append(box)
        indices.append(index)
    return Scene(image, background, np.stack(ink), np.stack(boxes), np.array(indices))


def _iou(first, second):
    """Intersection over union of two X, Y, width, height boxes."""
    sides = np.minimum(first[:2] + first[2:], second[:2] + second[2:])
    sides = np.maximum(sides - np.maximum(first[:2], second[:2]), 0)
    inter = sides.prod()
    return inter / (first[2:].prod() + second[2:].prod() - inter)


def _write_splits(folder, parameters):
    digits, labels = load_digits()
    counts = [parameters["num_train"], parameters["num_val"]]
    progress = Progress("Digits", sum(counts))
    candidates = split_digits(parameters["seed"])
    for number, (split, count) in enumerate(zip(SPLITS, counts, strict=True)):
        (folder / split).mkdir()
        images, annotations = [], []
        for image_id in range(1, count + 1):
            # Seeded by image, so that a smaller set is the beginning of a larger one.
            rng = np.random.default_rng([parameters["seed"], number, image_id])
            scene = compose_scene(digits, candidates[number], parameters["image_size"], rng)
            file_name = f"{image_id:06d}.png"
            Image.fromarray(scene.image).save(folder / split / file_name, compress_level=1)
            height, width = scene.image.shape[:2]
            images.append(
                {"id": image_id, "file_name": file_name, "height": height, "width": width}
            )
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
            progress.step()
        content = {
            "info": {
                "description": "Handwritten digits on textured backgrounds",
                "split": split,
                "parameters": parameters,
            },
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": digit + 1, "name": name} for digit, name in enumerate(DIGIT_NAMES)
            ],
        }
        (folder / f"{split}.json").write_text(json.dumps(content))


# Raised whenever the same parameters give other images, so that an older folder is not reused.
CROPS_VERSION = 1

# Pixels. The digits are the larger ones of the detection set, whose images have twice the side.
SIZE = 64

HEIGHTS = (36, 60)


def write_digit_crops(root, *, num_train=4000, num_val=500, seed=0):
    """Write the digits classification set as PNG images, or reuse it where it is there.

    The folder holds `train/CLASS/*.png` and `val/CLASS/*.png`, with as many images of each class,
    and `info.json`. It shows the digits of the detection set of the same seed: those of its
    validation images are in no training image.

    Args:
        root (str or path): the folder to write, whole or not at all.
        num_train (int): training images, >= 10.
        num_val (int): validation images, >= 10.
        seed (int): seed of the split of the digits and of every image, >= 0.

    Returns:
        Path: `root`.

    Raises:
        ValueError: an argument is out of range, or `root` holds something else than this set.
    """
    parameters = check_integers(
        num_train=(num_train, len(DIGIT_NAMES)),
        num_val=(num_val, len(DIGIT_NAMES)),
        seed=(seed, 0),
    )
    parameters["version"] = CROPS_VERSION
    return write_once(root, "digits classification set", "info.json", parameters, _write_crops)


def register_digit_crops(root=None, *, name="digit_crops", **parameters):
    """Register `{name}_train` and `{name}_val` in detectron2 without writing anything yet.

    The set is written when one of them is first loaded. Calling this again is harmless.

    Args:
        root (str or path or None): the folder of the set; None means `digit_crops` under
            `$DETECTRON2_DATASETS`, which is `datasets` unless it is set.
        name (str): what the names of the datasets begin with.
        **parameters: arguments of `write_digit_crops`.

    Raises:
        DatasetError: the names are taken by other data.
    """
    root = os.fspath(builtin_path(name) if root is None else root)
    for split in SPLITS:
        register_class_folders(
            f"{name}_{split}",
            os.path.join(root, split),
            class_names=DIGIT_NAMES,
            prepare=partial(write_digit_crops, root, **parameters),
        )


def compose_crop(digit, background, rng):
    """Compose one image of the set: a digit anywhere in it.

    Args:
        digit (ndarray): (8, 8) float32, ink in 0..1.
        background (ndarray): (64, 64, 3) uint8 RGB.
        rng (numpy.random.Generator): the only source of randomness.

    Returns:
        tuple[ndarray, ndarray]: the (64, 64, 3) uint8 RGB image, and the (64, 64) bool pixels that
            the digit covers.
    """
    image = background.copy()
    alpha = _drawn_ink(digit, rng)
    h, w = alpha.shape
    x, y = (int(rng.integers(0, SIZE - side, endpoint=True)) for side in (w, h))
    place = np.s_[y : y + h, x : x + w]
    paint(image, background, place, alpha, rng)
    ink = np.zeros((SIZE, SIZE), dtype=bool)
    ink[place] = alpha > 0
    return image, ink


def _drawn_ink(digit, rng):
    """Draw a height and return the opacity of a digit of about that height, which fits in."""
    while True:
        alpha = scaled_ink(digit, np.exp(rng.uniform(*np.log(HEIGHTS))))
        if max(alpha.shape) <= SIZE:
            return alpha


def _write_crops(folder, parameters):
    digits, labels = load_digits()
    progress = Progress("Digit crops", parameters["num_train"] + parameters["num_val"])
    for number, (split, candidates) in enumerate(
        zip(SPLITS, split_digits(parameters["seed"]), strict=True)
    ):
        members = [candidates[labels[candidates] == label] for label in range(len(DIGIT_NAMES))]
        for name in DIGIT_NAMES:
            (folder / split / name).mkdir(parents=True)
        for image_id in range(parameters[f"num_{split}"]):
            # Seeded by image, so that a smaller set is the beginning of a larger one.
            rng = np.random.default_rng([parameters["seed"], number, image_id])
            if image_id % 4 == 0:
                # As in the detection set, which is drawn in twice the size: for four images.
                whole = draw_background(2 * SIZE, rng)
                halves = np.split(whole, 2)
                quarters = [quarter for half in halves for quarter in np.split(half, 2, axis=1)]
            label = image_id % len(DIGIT_NAMES)
            digit = digits[rng.choice(members[label])]
            image, _ = compose_crop(digit, quarters[image_id % 4], rng)
            path = folder / split / DIGIT_NAMES[label] / f"{image_id + 1:04d}.png"
            Image.fromarray(image).save(path, compress_level=1)
            progress.step()
    info = {"description": "Handwritten digits, one in each image", "parameters": parameters}
    (folder / "info.json").write_text(json.dumps({"info": info}))

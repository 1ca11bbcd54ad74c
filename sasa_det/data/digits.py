"""The embedded detection set: handwritten digits on textured backgrounds, written from a seed."""

import json
import os
from dataclasses import dataclass

import numpy as np
from iopath.common.file_io import PathHandler
from PIL import Image

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
from .errors import DatasetError
from .generated import Progress, check_integers, write_once

__all__ = ["DIGIT_NAMES", "register_digits", "split_digits", "write_digits"]

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

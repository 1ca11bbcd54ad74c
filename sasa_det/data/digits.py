"""The embedded detection set: handwritten digits on textured backgrounds, written from a seed."""

import json
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
from iopath.common.file_io import PathHandler
from PIL import Image

from .errors import DatasetError

__all__ = ["DIGIT_NAMES", "register_digits", "split_digits", "write_digits"]

logger = logging.getLogger(__name__)

DIGIT_NAMES = tuple(str(digit) for digit in range(10))
# Raised whenever the same parameters give other images, so that an older folder is not reused.
GENERATOR_VERSION = 1
SPLITS = ("train", "val")

VAL_FRACTION = 0.2
DIGITS_PER_IMAGE = (2, 5)
# Heights of the ink, as fractions of the image's side: 24 to 64 pixels at 128.
HEIGHT_RANGE = (0.1875, 0.5)
MAX_IOU = 0.05
# Difference in luminance (0..255) between the ink, which is light, and the mean of the background
# in its box.
CONTRAST_RANGE = (70.0, 150.0)
# The mean luminance of a background; there is room for the contrast above it.
BACKGROUND_RANGE = (30.0, 125.0)
PLACEMENT_ATTEMPTS = 60
LUMINANCE = np.array([0.299, 0.587, 0.114])


def split_digits(seed=0):
    """Split scikit-learn's handwritten digits into training and validation, class by class.

    Args:
        seed (int): seed of the split, >= 0.

    Returns:
        tuple[ndarray, ndarray]: sorted int64 indices into `sklearn.datasets.load_digits()` of the
            training digits (about 80 % of every class) and of the validation digits.
    """
    return _split_labels(_load_digits()[1], seed)


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
    parameters = {
        "num_train": num_train,
        "num_val": num_val,
        "image_size": image_size,
        "seed": seed,
    }
    for name, least in (("num_train", 1), ("num_val", 1), ("image_size", 64), ("seed", 0)):
        value = parameters[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    parameters["version"] = GENERATOR_VERSION

    root = Path(root)
    if _holds_anything(root):
        _check_parameters(root, parameters)
        return root

    logger.info("Writing the digits detection set to %s: %s", root, parameters)
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as folder:
        # A subfolder, because the temporary folder itself is readable by its owner only.
        staging = Path(folder) / root.name
        staging.mkdir()
        _write_splits(staging, parameters)
        try:
            os.rename(staging, root)
        except OSError:
            if not _holds_anything(root):
                raise
            logger.info("Another process has written %s meanwhile: using that", root)
            _check_parameters(root, parameters)
    return root


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

    if root is None:
        root = os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), name)
    root = os.fspath(root)

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
    background = _background(image_size, rng)
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
        alpha = _scaled_ink(digits[index], height)
        h, w = alpha.shape
        x, y = (int(rng.integers(0, image_size - side, endpoint=True)) for side in (w, h))
        place = np.s_[y : y + h, x : x + w]
        box = np.array([x, y, w, h])
        if (occupied[place] & (alpha > 0)).any() or any(_iou(box, b) > MAX_IOU for b in boxes):
            continue
        colour = _ink_colour(background[place].mean(axis=(0, 1)), rng)
        blend = alpha[..., None]
        image[place] = np.rint(image[place] * (1 - blend) + colour * blend).astype(np.uint8)
        mask = np.zeros_like(occupied)
        mask[place] = alpha > 0
        occupied |= mask
        ink.append(mask)
        boxes.append(box)
        indices.append(index)
    return Scene(image, background, np.stack(ink), np.stack(boxes), np.array(indices))


def _load_digits():
    """Returns (1797, 8, 8) float32 ink in 0..1 and (1797,) int64 labels."""
    from sklearn.datasets import load_digits

    source = load_digits()
    return (source.images / 16).astype(np.float32), source.target.astype(np.int64)


def _split_labels(labels, seed):
    rng = np.random.default_rng(seed)
    val = []
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(labels == digit))
        val.append(members[: round(VAL_FRACTION * len(members))])
    val = np.sort(np.concatenate(val))
    return np.setdiff1d(np.arange(len(labels)), val), val


def _scaled_ink(digit, height):
    """Scale a digit so that its ink is about `height` pixels high, and cut it out tightly.

    Returns:
        ndarray: (h, w) float32 opacity in 0..1; no border row or column is empty.
    """
    rows, columns = np.flatnonzero(digit.any(axis=1)), np.flatnonzero(digit.any(axis=0))
    digit = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = height / digit.shape[0]
    digit = np.pad(digit, 1)
    size = (round(digit.shape[1] * scale), round(digit.shape[0] * scale))
    smooth = np.asarray(Image.fromarray(digit).resize(size, Image.Resampling.BICUBIC))
    # Eight pixels enlarged are a blur: a steep ramp makes strokes with an edge of them. What would
    # hardly be seen is left out, so that the box is that of the visible ink.
    alpha = np.clip((smooth - 0.2) / 0.35, 0, 1)
    alpha[alpha < 0.25] = 0
    rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _background(size, rng):
    """Colour gradient with smooth noise of several scales. Returns (size, size, 3) uint8."""
    # Luminance is shared by the channels and colour is not, so the texture has both.
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
    ramp = (np.cos(angle) * x + np.sin(angle) * y)[..., None]
    texture = ramp * (rng.uniform(-25, 25) + rng.uniform(-40, 40, size=3))
    strength = rng.uniform(0.5, 1.0)
    for cells in (3, 6, 12, 24, 48):
        amplitude = strength * 14 * (cells / 3) ** -0.35
        noise = rng.normal(0, amplitude, (cells, cells, 1)) + rng.normal(
            0, 0.6 * amplitude, (cells, cells, 3)
        )
        texture = texture + np.stack(
            [
                np.asarray(
                    Image.fromarray(channel.astype(np.float32)).resize(
                        (size, size), Image.Resampling.BICUBIC
                    )
                )
                for channel in np.moveaxis(noise, -1, 0)
            ],
            axis=-1,
        )
    base = _with_luminance(rng.uniform(0, 255, size=3), rng.uniform(*BACKGROUND_RANGE))
    return np.clip(np.rint(base + texture), 0, 255).astype(np.uint8)


def _ink_colour(background, rng):
    """Draw a light ink colour that stands out from a mean background colour."""
    level = float(background @ LUMINANCE)
    target = min(level + rng.uniform(*CONTRAST_RANGE), 255.0)
    return _with_luminance(rng.uniform(0, 255, size=3), target)


def _with_luminance(colour, target):
    """Blend a colour with black or white so that it has a given luminance."""
    level = colour @ LUMINANCE
    if target <= level:
        return colour * (target / level)
    return colour + (255 - colour) * ((target - level) / (255 - level))


def _iou(first, second):
    """Intersection over union of two X, Y, width, height boxes."""
    sides = np.minimum(first[:2] + first[2:], second[:2] + second[2:])
    sides = np.maximum(sides - np.maximum(first[:2], second[:2]), 0)
    inter = sides.prod()
    return inter / (first[2:].prod() + second[2:].prod() - inter)


def _holds_anything(root):
    # An empty folder may be taken: renaming onto it replaces it.
    if not root.exists():
        return False
    return not root.is_dir() or any(root.iterdir())


def _check_parameters(root, parameters):
    try:
        found = json.loads((root / "val.json").read_text())["info"]["parameters"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{root} is not a digits detection set ({error.__class__.__name__} reading val.json): "
            "name a folder that does not exist"
        ) from error
    if found != parameters:
        raise DatasetError(
            f"{root} was written with {found}, not with the requested {parameters}: "
            "name another folder or remove this one"
        )


def _write_splits(folder, parameters):
    digits, labels = _load_digits()
    counts = [parameters["num_train"], parameters["num_val"]]
    progress = _Progress(sum(counts))
    candidates = _split_labels(labels, parameters["seed"])
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


class _Progress:
    """Logs how many images are written, and when it will be done, every few seconds."""

    def __init__(self, total, every=5.0):
        self.total = total
        self.every = every
        self.done = 0
        self.start = self.last = time.monotonic()

    def step(self):
        self.done += 1
        now = time.monotonic()
        if self.done == self.total or now - self.last >= self.every:
            self.last = now
            eta = round((now - self.start) / self.done * (self.total - self.done))
            logger.info(
                "Digits: %d of %d images, ETA %s", self.done, self.total, timedelta(seconds=eta)
            )

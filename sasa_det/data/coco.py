"""Data sets in COCO's json format: checked before training, and registered with detectron2."""

import difflib
import json
import os
from collections import defaultdict
from dataclasses import dataclass

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from .errors import DatasetError

__all__ = [
    "CocoSummary",
    "DatasetError",
    "check_coco",
    "check_registered",
    "num_classes_of",
    "register_coco",
]


@dataclass(frozen=True)
class CocoSummary:
    """What a checked COCO json file holds.

    Attributes:
        num_images (int): images listed.
        num_annotations (int): annotations listed, crowds included.
        class_names (tuple[str]): names of the categories in the order of their ids, which is the
            order of detectron2's contiguous class indices.
    """

    num_images: int
    num_annotations: int
    class_names: tuple


def check_coco(json_file, image_root, *, training=None):
    """Check that a COCO json file and its images can be trained or evaluated on.

    Args:
        json_file (str or path): COCO instances json; anything that detectron2's PathManager reads.
        image_root (str or path): the local folder that the images' `file_name` is relative to.
        training (bool or None): True for a training set, which must hold annotations; False for an
            evaluation set, whose annotations must have the `area` and `iscrowd` that the COCO
            metrics need; None where the use is not known yet.

    Returns:
        CocoSummary: what the file holds.

    Raises:
        FileNotFoundError: the json file, the folder or an image is missing.
        DatasetError: the json file cannot be used; the message names it and its first problem.
    """
    _check_exists(json_file, image_root)
    content = _read_json(json_file)
    # Each check may rely on those before it, so only the first problem is sure to be real.
    for check in (_missing_keys, _emptiness, _unknown_references):
        for problem in check(content, training):
            raise DatasetError(f"{json_file}: {problem}")
    _check_images_exist(json_file, image_root, content["images"])
    return CocoSummary(
        len(content["images"]), len(content["annotations"]), _class_names(content["categories"])
    )


def register_coco(name, json_file, image_root):
    """Check a COCO json data set and register it with detectron2, its classes included.

    Args:
        name (str): the name for `cfg.DATASETS`.
        json_file (str or path): COCO instances json.
        image_root (str or path): the folder of the images.

    Raises:
        FileNotFoundError: as `check_coco`.
        DatasetError: as `check_coco`, or the name stands for other files. Registering the same
            files under the same name again is harmless.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name)
        found = (known.get("json_file"), known.get("image_root"))
        if found != (json_file, image_root):
            raise DatasetError(
                f"dataset {name!r} is already registered with json_file and image_root {found}, "
                f"not {(json_file, image_root)}: give the new data another name"
            )
        return
    summary = check_coco(json_file, image_root)
    register_coco_instances(name, {}, json_file, image_root)
    # detectron2 sets this when it loads the data; here it is known before.
    MetadataCatalog.get(name).thing_classes = list(summary.class_names)


def num_classes_of(dataset_names):
    """Number of classes of registered data sets, known without loading them.

    Args:
        dataset_names (sequence[str]): names as in `cfg.DATASETS.TRAIN`, at least one.

    Returns:
        int: the number of classes.

    Raises:
        DatasetError: there are no names, a name is not registered, its classes are not known, or
            the data sets do not have the same classes.
    """
    if not dataset_names:
        raise DatasetError("no dataset is named: at least one registered dataset is needed")
    classes = {name: _metadata(name).get("thing_classes") for name in dataset_names}
    for name, names in classes.items():
        if names is None:
            raise DatasetError(
                f"dataset {name!r} has no 'thing_classes' in its metadata: register it with "
                "sasa_det.data.register_coco or set them"
            )
    first = dataset_names[0]
    for name, names in classes.items():
        if list(names) != list(classes[first]):
            raise DatasetError(
                f"datasets {first!r} ({_shortened(classes[first])}) and {name!r} "
                f"({_shortened(names)}) have different classes: data sets that are used together "
                "must have the same classes in the same order"
            )
    return len(classes[first])


def check_registered(names, training):
    """Check registered data sets before they are used.

    Files are looked for where the metadata has `json_file` and `image_root`; those that are
    evaluated with COCO's metrics go through `check_coco` as well. This reads the whole json file,
    which takes seconds for COCO: one process of a job is enough.

    Args:
        names (sequence[str]): names as in `cfg.DATASETS`.
        training (bool): whether they are for training, see `check_coco`.

    Raises:
        DatasetError: a name is not registered, or as `check_coco`, or the classes in the file are
            not those in the metadata.
        FileNotFoundError: a file is missing; the message says where it was looked for.
    """
    for name in names:
        metadata = _metadata(name)
        json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
        if json_file is None or image_root is None:
            continue
        try:
            if metadata.get("evaluator_type") != "coco":
                _check_exists(json_file, image_root)
                continue
            summary = check_coco(json_file, image_root, training=training)
        except FileNotFoundError as error:
            root = os.getenv("DETECTRON2_DATASETS", "datasets")
            raise FileNotFoundError(
                f"dataset {name!r}: {error} (looked in {os.path.abspath(json_file)} and "
                f"{os.path.abspath(image_root)}; $DETECTRON2_DATASETS, now {root!r}, sets the "
                "root of the builtin datasets)"
            ) from error
        classes = metadata.get("thing_classes")
        if classes is not None and tuple(classes) != summary.class_names:
            raise DatasetError(
                f"{json_file}: its categories ({_shortened(summary.class_names)}) are not the "
                f"classes that dataset {name!r} is registered with ({_shortened(classes)})"
            )


def _metadata(name):
    if name not in DatasetCatalog:
        nearest = difflib.get_close_matches(name, DatasetCatalog.keys())
        hint = f", did you mean {' or '.join(map(repr, nearest))}" if nearest else ""
        raise DatasetError(f"dataset {name!r} is not registered{hint}")
    return MetadataCatalog.get(name)


def _read_json(json_file):
    try:
        with open(PathManager.get_local_path(os.fspath(json_file)), encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise DatasetError(f"{json_file}: cannot be read: {error.strerror}") from error
    # A UnicodeDecodeError is a ValueError, as json's own error is.
    except ValueError as error:
        raise DatasetError(f"{json_file}: is not JSON: {error}") from error


# Checks: generators of the problems of the json file's content, each one a clause.


def _missing_keys(content, training):
    if not isinstance(content, dict):
        yield f"must hold a JSON object (COCO instances), not a {type(content).__name__}"
        return
    needed = {
        "images": ("id", "file_name", "height", "width"),
        "annotations": ("id", "image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }
    if training is False:
        needed["annotations"] += ("area", "iscrowd")
    for section, keys in needed.items():
        if section not in content:
            yield f"lacks {section!r}; COCO instances have 'images', 'annotations', 'categories'"
        elif not isinstance(content[section], list):
            yield f"{section!r} must be a list, not a {type(content[section]).__name__}"
        else:
            for index, entry in enumerate(content[section]):
                if not isinstance(entry, dict):
                    yield f"{section}[{index}] must be an object, not a {type(entry).__name__}"
                    continue
                for key in keys:
                    if key not in entry:
                        yield f"{section}[{index}] lacks {key!r}; needed are {', '.join(keys)}"


def _emptiness(content, training):
    if not content["images"]:
        yield "'images' is empty; at least one image is needed"
    if not content["categories"]:
        yield "'categories' is empty; at least one category is needed"
    if training and not content["annotations"]:
        yield "'annotations' is empty; a training set needs at least one annotation"


def _unknown_references(content, training):
    for key, section in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in content[section]}
        for index, annotation in enumerate(content["annotations"]):
            if annotation[key] not in known:
                yield (
                    f"annotations[{index}] (id {annotation['id']}) has {key} {annotation[key]}, "
                    f"which is not the id of any of the {len(known)} {section}"
                )


def _check_images_exist(json_file, image_root, images):
    # Listing a folder once is much cheaper than asking for every image.
    folders = defaultdict(list)
    for image in images:
        folder, base = os.path.split(os.path.join(image_root, image["file_name"]))
        folders[folder].append(base)
    missing = []
    for folder, bases in folders.items():
        present = {entry.name for entry in os.scandir(folder)} if os.path.isdir(folder) else ()
        missing += [os.path.join(folder, base) for base in bases if base not in present]
    if missing:
        raise FileNotFoundError(
            f"{json_file}: {len(missing)} of {len(images)} image files do not exist, the first "
            f"is {missing[0]}"
        )


def _check_exists(json_file, image_root):
    if not os.path.isfile(PathManager.get_local_path(os.fspath(json_file))):
        raise FileNotFoundError(f"json file {json_file} does not exist")
    if not os.path.isdir(image_root):
        raise FileNotFoundError(f"image folder {image_root} of {json_file} does not exist")


def _class_names(categories):
    return tuple(category["name"] for category in sorted(categories, key=lambda c: c["id"]))


def _shortened(names):
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)}: {shown}"

"""A COCO json file's content, examined one section after the other."""

import json
import os
from collections import Counter

from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from . import problems
from .coco_entries import (
    ANNOTATION_FIELDS,
    CATEGORY_FIELDS,
    IMAGE_FIELDS,
    area_problem,
    box_problem,
    crowd_problem,
    described,
    field_problems,
    id_of,
    is_file_name,
    is_id,
    is_name,
    mask_problem,
    shown,
    size_of,
)
from .errors import ImageError
from .image_files import check_image_files
from .problems import Problem
from .reading import check_pixels

__all__ = ["CocoContent"]

_SECTIONS = ("images", "annotations", "categories")


class CocoContent:
    """Finds the problems of a COCO json file, and counts what it holds on the way.

    Attributes:
        num_images, num_annotations, num_crowds (int): counts of entries.
        names (dict[int, str]): names of the categories by id.
        boxes (Counter[int]): annotations, without crowds, by id of the category.
        sizes (dict[int, tuple or None]): (height, width) of the images by id, if valid.
        annotated (set[int]): ids of the images that have annotations.
    """

    def __init__(self, image_root, max_pixels, mask_format):
        """
        Args:
            image_root, max_pixels, mask_format: as for `validate_coco`.
        """
        self.image_root, self.max_pixels, self.mask_format = image_root, max_pixels, mask_format
        self.num_images = self.num_annotations = self.num_crowds = 0
        self.names = {}
        self.boxes = Counter()
        self.sizes = {}
        self.annotated = set()
        self._annotation_ids = set()
        self._readable = []  # (id, name in messages, path, size) of images whose file is there

    def examine(self, json_file):
        """Yield the problems of a file, those first that others may follow from."""
        try:
            content = _read_object(json_file)
        except _NotAnObject as error:
            yield Problem(problems.NOT_COCO, str(error))
            return
        usable = True
        for name in _SECTIONS:
            if name not in content:
                usable = False
                yield Problem(
                    problems.NOT_COCO,
                    f"lacks {name!r}; COCO instances have 'images', 'annotations' and "
                    "'categories', without which nothing can be learned and no AP be computed",
                )
            elif not isinstance(content[name], list):
                usable = False
                clause = f"{name!r} must be a list, not {described(content[name])}"
                yield Problem(problems.NOT_COCO, clause)
        if usable:
            yield from self._categories(content["categories"])
            yield from self._images(content["images"])
            yield from self._annotations(content["annotations"])
            yield from self._files(content["images"])

    def examine_pixels(self):
        """Yield the problems of decoding the images that `examine` found, with a progress bar."""
        for image_id, where, path, size in tqdm(self._readable, desc="Images", unit=""):
            try:
                check_pixels(path, self.max_pixels, size=size)
            except ImageError as error:
                yield Problem(problems.UNREADABLE, f"{where}: {error}", image_id)

    def _categories(self, section):
        if not section:
            yield Problem(
                problems.EMPTY_SECTION, "'categories' is empty; at least one category is needed"
            )
        first = {}
        for index, entry in enumerate(section):
            where = _where("categories", index, entry)
            for kind, clause in field_problems(entry, CATEGORY_FIELDS, self.names):
                yield Problem(kind, f"{where} {clause}")
            name = entry.get("name") if isinstance(entry, dict) else None
            if not is_name(name):
                continue
            if first.setdefault(name, index) != index:
                clause = f"has the name {shown(name)} of categories[{first[name]}]"
                yield Problem(problems.REPEATED_NAME, f"{where} {clause}")
            if id_of(entry) is not None:
                self.names.setdefault(entry["id"], name)

    def _images(self, section):
        self.num_images = len(section)
        if not section:
            yield Problem(problems.EMPTY_SECTION, "'images' is empty; at least one image is needed")
        first = {}
        for index, entry in enumerate(section):
            for kind, clause in self._image(index, entry, first):
                yield Problem(kind, f"{_where('images', index, entry)} {clause}", id_of(entry))

    def _image(self, index, entry, first):
        """Yield the problems of one image; `first` holds the index of the first of each name."""
        yield from field_problems(entry, IMAGE_FIELDS, self.sizes)
        if not isinstance(entry, dict):
            return
        size, name = size_of(entry), entry.get("file_name")
        if id_of(entry) is not None:
            self.sizes.setdefault(entry["id"], size)
        if size is not None and size[0] * size[1] > self.max_pixels:
            clause = f"has {size[1]} x {size[0]} pixels, more than the {self.max_pixels:,} that "
            yield problems.TOO_LARGE, clause + "INPUT.MAX_PIXELS allows"
        if is_file_name(name) and first.setdefault(name, index) != index:
            yield problems.REPEATED_FILE, f"has the file {name!r} of images[{first[name]}]"

    def _annotations(self, section):
        self.num_annotations = len(section)
        for index, entry in enumerate(section):
            for kind, clause in self._annotation(entry):
                image_id = entry.get("image_id") if isinstance(entry, dict) else None
                if not is_id(image_id) or image_id not in self.sizes:
                    image_id = None
                where = _where("annotations", index, entry, image_id)
                yield Problem(kind, f"{where} {clause}", image_id, id_of(entry))
        if not section:
            clause = "'annotations' is empty; a training set needs at least one annotation"
            yield Problem(problems.NOTHING_TO_TRAIN_ON, clause)
            yield Problem(problems.NO_AP, "'annotations' is empty: AP cannot be computed")
            return
        if self.num_crowds == len(section):
            clause = "all 'annotations' are crowds, which training leaves out"
            yield Problem(problems.NOTHING_TO_TRAIN_ON, clause)
        for identity, name in self.names.items():
            if not self.boxes[identity]:
                clause = f"category {identity} ({shown(name)}) has no boxes"
                yield Problem(problems.UNUSED_CLASS, clause)

    def _annotation(self, entry):
        """Yield the problems of one annotation."""
        yield from field_problems(entry, ANNOTATION_FIELDS, self._annotation_ids)
        if not isinstance(entry, dict):
            return
        identity = id_of(entry)
        self._annotation_ids.add(identity)
        if identity == 0:
            yield problems.ID_ZERO, "has the id 0, which pycocotools takes for none"

        size, image_id = None, entry.get("image_id")
        if is_id(image_id):
            if image_id in self.sizes:
                size = self.sizes[image_id]
                self.annotated.add(image_id)
            else:
                yield _unknown("image_id", image_id, self.sizes, "images")

        crowd = entry.get("iscrowd", 0)
        if problem := crowd_problem(crowd):
            yield problem
            crowd = 0
        self.num_crowds += crowd

        category_id = entry.get("category_id")
        if is_id(category_id):
            if category_id not in self.names:
                yield _unknown("category_id", category_id, self.names, "categories")
            elif not crowd:
                self.boxes[category_id] += 1

        if "bbox" in entry and (problem := box_problem(entry["bbox"], size)):
            yield problem

        if entry.get("ignore", 0) != 0:
            yield problems.IGNORED, f"has ignore {shown(entry['ignore'])}; it must be 0 or absent"

        needed = [key for key in ("area", "iscrowd") if key not in entry]
        if needed:
            keys = " and ".join(map(repr, needed))
            yield problems.MISSING_FOR_AP, f"lacks {keys}, which the COCO metrics need"
        if "area" in entry and (problem := area_problem(entry["area"])):
            yield problem

        segmentation = entry.get("segmentation")
        if segmentation:
            if problem := mask_problem(segmentation, size):
                yield problem
            # Training leaves crowds out before it looks at their masks.
            elif self.mask_format == "polygon" and isinstance(segmentation, dict) and not crowd:
                yield problems.MASK_NOT_POLYGON, "has an RLE mask; set INPUT.MASK_FORMAT bitmask"
        elif self.mask_format:
            yield problems.MISSING_MASK, "lacks 'segmentation'; masks are trained (MODEL.MASK_ON)"

    def _files(self, section):
        names = {
            index: entry["file_name"]
            for index, entry in enumerate(section)
            if isinstance(entry, dict) and is_file_name(entry.get("file_name"))
        }
        unusable = set()
        for index, unsafe, clause in check_image_files(self.image_root, names):
            unusable.add(index)
            where = _where("images", index, section[index])
            kind = problems.UNSAFE_FILE if unsafe else problems.MISSING_FILE
            yield Problem(kind, f"{where}: {clause}", id_of(section[index]))
        for index, name in names.items():
            if index not in unusable:
                entry, path = section[index], os.path.join(self.image_root, name)
                where = _where("images", index, entry)
                self._readable.append((id_of(entry), where, path, size_of(entry)))


class _NotAnObject(Exception):
    """Why a file holds no JSON object."""


def _read_object(json_file):
    path = PathManager.get_local_path(os.fspath(json_file))
    try:
        if os.path.getsize(path) == 0:
            raise _NotAnObject("is empty")
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise _NotAnObject(f"cannot be read: {error.strerror}") from error
    # A UnicodeDecodeError is a ValueError, as json's own error is.
    except ValueError as error:
        raise _NotAnObject(f"is not JSON: {error}") from error
    except RecursionError as error:
        raise _NotAnObject("is not COCO instances: it is nested too deeply") from error
    if not isinstance(content, dict):
        raise _NotAnObject(f"must hold a JSON object (COCO instances), not {described(content)}")
    return content


def _where(section, index, entry, image_id=None):
    """Name an entry in a message."""
    identity = id_of(entry)
    known = [f"id {identity}"] if identity is not None else []
    known += [f"of image {image_id}"] if image_id is not None else []
    return f"{section}[{index}]" + (f" ({' '.join(known)})" if known else "")


def _unknown(key, value, known, section):
    clause = f"has {key} {value}, which is not the id of any of the {len(known)} {section}"
    return problems.UNKNOWN_REFERENCE, clause

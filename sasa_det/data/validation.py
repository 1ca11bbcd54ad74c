"""What is wrong with a COCO json file and its images, all of it."""

import gc
import json
import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

from detectron2.utils.file_io import PathManager
from pycocotools.mask import frPyObjects
from tqdm import tqdm

from ..errors import ImageError
from . import coco_entries as problems
from .coco_entries import (
    ANNOTATION_FIELDS,
    CATEGORY_FIELDS,
    IMAGE_FIELDS,
    Problem,
    are_corners,
    are_fractions,
    area_problem,
    box_problem,
    crowd_problem,
    described,
    field_problems,
    id_of,
    is_file_name,
    is_id,
    is_name,
    keypoints_problem,
    numbers_problem,
    shown,
    size_of,
)
from .coco_masks import mask_problem
from .images import MAX_PIXELS, check_image_files, check_pixels

__all__ = ["CocoContent", "CocoReport", "check_exists", "validate_coco"]


class Category(NamedTuple):
    """A class: `num_boxes` counts its annotations without the crowds."""

    id: int
    name: str
    num_boxes: int


@dataclass(frozen=True)
class CocoReport:
    """What a COCO json file holds, and what is wrong with it for a use.

    Attributes:
        json_file (str): the file.
        image_root (str): the folder of its images.
        training (bool or None): the use: training, evaluation, or not known.
        num_images (int): images listed.
        num_annotations (int): annotations listed, crowds included.
        num_crowds (int): annotations of crowds.
        num_unannotated (int): images without annotations.
        categories (tuple[Category]): in the order of their ids, which is the order of detectron2's
            contiguous class indices.
        counts (dict[Kind, int]): number of problems of each kind, for any use.
        has_decoded (bool): whether every image was decoded.
        problems (tuple[Problem]): all of them, or the first ones of each kind, for any use.
    """

    json_file: str
    image_root: str
    training: bool | None
    num_images: int
    num_annotations: int
    num_crowds: int
    num_unannotated: int
    categories: tuple
    counts: dict
    has_decoded: bool
    problems: tuple

    @property
    def class_names(self):
        return tuple(category.name for category in self.categories)

    def severity(self, kind):
        """Return "error", "warning", or None where a kind does not matter for the use."""
        if kind.training is None or kind.training == self.training:
            return kind.severity
        return "warning" if self.training is None else None

    def kinds(self, severity):
        """Return the kinds of problems that have a severity, in the order of discovery."""
        return [kind for kind in self.counts if self.severity(kind) == severity]

    def count(self, severity):
        """Return the number of problems that have a severity."""
        return sum(self.counts[kind] for kind in self.kinds(severity))

    def is_accepted(self, training):
        """Tell whether the data can be used for training, for evaluation, or for one of them."""
        if training is None:
            return self.is_accepted(True) or self.is_accepted(False)
        return self.for_use(training).count("error") == 0

    def examples(self, kind):
        """Return the problems of a kind that were kept."""
        return [problem for problem in self.problems if problem.kind == kind]

    def for_use(self, training):
        """Return the report on the same file for a use."""
        return replace(self, training=training)


def validate_coco(
    json_file,
    image_root,
    *,
    training=None,
    max_pixels=MAX_PIXELS,
    mask_format="",
    num_keypoints=0,
    limit=None,
    pixels=False,
):
    """Find all that is wrong with a COCO json file and its images.

    Args:
        json_file (str or path): COCO instances json; anything that detectron2's PathManager reads.
        image_root (str or path): the local folder that the images' `file_name` is relative to.
        training (bool or None): True for a training set, which must hold annotations; False for an
            evaluation set, whose annotations must have the `area` and `iscrowd` that the COCO
            metrics need; None where the use is not known, which makes such problems warnings.
        max_pixels (int): largest product of an image's height and width.
        mask_format (str): "polygon" or "bitmask", as `INPUT.MASK_FORMAT`, where masks are used.
        num_keypoints (int): as `MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS` where keypoints are used,
            else 0.
        limit (int or None): problems of each kind to keep; all are counted.
        pixels (bool): decode every image as well, with a progress bar.

    Returns:
        CocoReport: counts, classes and problems.

    Raises:
        FileNotFoundError: the json file or the folder is missing.
    """
    check_exists(json_file, image_root)
    content = CocoContent(image_root, max_pixels, mask_format, num_keypoints)
    counts, problems = Counter(), []

    def collect(found):
        for problem in found:
            counts[problem.kind] += 1
            if limit is None or counts[problem.kind] <= limit:
                problems.append(problem)

    with _no_garbage_collection():
        collect(content.examine(json_file))
    if pixels:
        collect(content.examine_pixels())
    return CocoReport(
        json_file=os.fspath(json_file),
        image_root=os.fspath(image_root),
        training=training,
        num_images=content.num_images,
        num_annotations=content.num_annotations,
        num_crowds=content.num_crowds,
        num_unannotated=len(content.sizes) - len(content.annotated),
        categories=tuple(
            Category(identity, name, content.boxes[identity])
            for identity, name in sorted(content.names.items())
        ),
        counts=dict(counts),
        has_decoded=pixels,
        problems=tuple(problems),
    )


def check_exists(json_file, image_root):
    """Raise FileNotFoundError if a json file or its image folder is missing."""
    local = PathManager.get_local_path(os.fspath(json_file))
    if not os.path.isfile(local):
        raise FileNotFoundError(
            f"json file {json_file} {'is a folder' if os.path.isdir(local) else 'does not exist'}"
        )
    if not os.path.isdir(image_root):
        raise FileNotFoundError(f"image folder {image_root} of {json_file} does not exist")


@contextmanager
def _no_garbage_collection():
    # COCO's millions of objects, none of them garbage, would make it run again and again, for more
    # than half of the time.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


_SECTIONS = ("images", "annotations", "categories")

# The share of the boxes from which on those that fit their image as two corners only are told: some
# boxes of many data sets are a little too large.
_CORNERS_SHARE = 0.05


class CocoContent:
    """Finds the problems of a COCO json file, and counts what it holds on the way.

    Attributes:
        num_images, num_annotations, num_crowds (int): counts of entries.
        num_left_out (int): annotations that training leaves out.
        names (dict[int, str]): names of the categories by id.
        boxes (Counter[int]): annotations, without crowds, by id of the category.
        sizes (dict[int, tuple or None]): (height, width) of the images by id, if valid.
        annotated (set[int]): ids of the images that have annotations.
    """

    def __init__(self, image_root, max_pixels, mask_format, num_keypoints):
        """
        Args:
            image_root, max_pixels, mask_format, num_keypoints: as for `validate_coco`.
        """
        self.image_root, self.max_pixels = image_root, max_pixels
        self.mask_format, self.num_keypoints = mask_format, num_keypoints
        self.num_images = self.num_annotations = self.num_crowds = self.num_left_out = 0
        self.names = {}
        self.boxes = Counter()
        self.sizes = {}
        self.annotated = set()
        # Where training leaves out all annotations it has nothing to learn from.
        self._left_out = {
            problems.EMPTY_BOX,
            problems.OUTSIDE_BOX,
            problems.NO_VISIBLE_KEYPOINT,
        }
        if mask_format:
            self._left_out.add(problems.NO_POLYGON)
        if mask_format == "bitmask":
            self._left_out.add(problems.EMPTY_MASK)
        self._annotation_ids = set()
        self._objects = set()
        self._corners = []  # problems of boxes that fit their image as two corners only
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
            is_left_out = False
            for kind, clause in self._annotation(entry):
                image_id = entry.get("image_id") if isinstance(entry, dict) else None
                if not is_id(image_id) or image_id not in self.sizes:
                    image_id = None
                where = _where("annotations", index, entry, image_id)
                problem = Problem(kind, f"{where} {clause}", image_id, id_of(entry))
                if kind == problems.CORNER_BOX:
                    self._corners.append(problem)
                else:
                    yield problem
                is_left_out |= kind in self._left_out
            is_crowd = isinstance(entry, dict) and entry.get("iscrowd") == 1
            self.num_left_out += is_left_out or is_crowd
        if len(self._corners) > _CORNERS_SHARE * len(section):
            yield from self._corners
        if not section:
            clause = "'annotations' is empty; a training set needs at least one annotation"
            yield Problem(problems.NOTHING_TO_TRAIN_ON, clause)
            kind = problems.BAD_KEYPOINTS_FOR_AP if self.num_keypoints else problems.NO_AP
            yield Problem(kind, "'annotations' is empty: AP cannot be computed")
            return
        if self.num_left_out == len(section):
            what = "crowds"
            if self.num_crowds < len(section):
                what += ", or without a box in their image and the mask or keypoints to be trained"
            clause = f"all 'annotations' are {what}: training leaves them out"
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
        if identity is not None and identity < 0:
            yield problems.NEGATIVE_ID, f"has the id {identity}; it must be >= 0"
        elif identity == 0:
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

        if "bbox" in entry:
            yield from self._box(entry, size, crowd)

        if entry.get("ignore", 0) != 0:
            yield (
                problems.IGNORED,
                f"has ignore {shown(entry['ignore'])}; it must be 0 or absent",
            )

        needed = [key for key in ("area", "iscrowd") if key not in entry]
        if needed:
            keys = " and ".join(map(repr, needed))
            yield problems.MISSING_FOR_AP, f"lacks {keys}, which the COCO metrics need"
        if "area" in entry and (problem := area_problem(entry["area"])):
            yield problem
        yield from self._mask(entry.get("segmentation"), size, crowd)
        yield from self._keypoints(entry)

    def _box(self, entry, size, crowd):
        box = entry["bbox"]
        problem = box_problem(box, size)
        if problem:
            yield problem
            if problem[0].severity == "error":
                return
        if "bbox_mode" in entry:
            yield problems.BOX_MODE, f"has bbox_mode {shown(entry['bbox_mode'])}"
        if are_fractions(box):
            yield problems.FRACTION_BOX, f"has bbox {shown(box)} within 0..1"
        if problem and size and problem[0] != problems.EMPTY_BOX and are_corners(box, size):
            clause = f"has bbox {shown(box)}, which fits the image as two corners alone"
            yield problems.CORNER_BOX, clause
        if entry.get("area") == 0 and (not problem or problem[0] != problems.EMPTY_BOX):
            yield problems.ZERO_AREA, f"has area 0 and bbox {shown(box)}"
        ids = entry.get("image_id"), entry.get("category_id")
        if all(map(is_id, ids)):
            # Of a million annotations the objects themselves would take too much memory.
            key = hash((*ids, crowd, *box))
            if key in self._objects:
                yield (
                    problems.DUPLICATE,
                    f"has image, class and bbox {shown(box)} of another one",
                )
            self._objects.add(key)

    def _mask(self, segmentation, size, crowd):
        # Training leaves crowds out before it looks at their masks.
        if not segmentation:
            if self.mask_format:
                kind = problems.MISSING_MASK_FOR_AP if crowd else problems.MISSING_MASK
                yield kind, "lacks 'segmentation'; masks are trained (MODEL.MASK_ON)"
            return
        problem = mask_problem(segmentation, size)
        if problem and problem[0] == problems.BAD_MASK and not self.mask_format:
            problem = problems.UNUSED_MASK, problem[1]
        if problem and (self.mask_format or problem[0] != problems.EMPTY_MASK):
            yield problem
        if not self.mask_format or (problem and problem[0] == problems.BAD_MASK):
            return
        if self.mask_format == "polygon" and isinstance(segmentation, dict) and not crowd:
            yield problems.MASK_NOT_POLYGON, "has an RLE mask; set INPUT.MASK_FORMAT bitmask"
        if problem and size and isinstance(segmentation, list):
            try:
                frPyObjects(segmentation, *size)
            except Exception as error:  # pycocotools raises bare ones
                clause = f"has a segmentation that pycocotools refuses: {error}"
                yield problems.MISSING_MASK_FOR_AP, clause

    def _keypoints(self, entry):
        if self.num_keypoints:
            if problem := keypoints_problem(entry, self.num_keypoints):
                yield problem
            elif not any(entry["keypoints"][2::3]):
                yield problems.NO_VISIBLE_KEYPOINT, "has no labelled keypoint"
        elif entry.get("keypoints") and (clause := numbers_problem(entry["keypoints"])):
            yield problems.UNUSED_KEYPOINTS, f"has keypoints {clause}"

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

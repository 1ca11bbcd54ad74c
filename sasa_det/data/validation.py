"""What is wrong with a COCO json file and its images, all of it."""

import json
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from ..errors import ImageError
from ..utils.files import require_file
from ..utils.garbage import no_garbage_collection
from . import coco_entries as problems
from .coco_entries import (
    FIELDS,
    Finding,
    Kind,
    Problem,
    box_problems,
    check_fields,
    described,
    keypoints_problems,
    shown,
)
from .coco_masks import mask_problems
from .images import MAX_PIXELS, check_image_files, check_size, read_image
from .keypoints import keypoint_names
from .sources import reading_of

# The share of the boxes from which on those that fit their image as two corners only are reported:
# some boxes of many data sets are a little too large.
_CORNERS_SHARE = 0.05
# Sections that must not be empty, whatever the use, and one of their entries in words.
_NEEDED = {"categories": "category", "images": "image"}


class Category(NamedTuple):
    """A class: `num_boxes` counts its annotations without the crowds; `keypoints` are names."""

    id: int
    name: str
    num_boxes: int
    keypoints: tuple[str, ...] = ()


@dataclass(frozen=True)
class CocoReport:
    """What a COCO json file holds, and what is wrong with it for a use.

    Attributes:
        training: the use: True for training, False for evaluation, None if it is not known.
        num_annotations: annotations listed, crowds included.
        num_unannotated: images without annotations.
        categories: in the order of their ids, which is the order of detectron2's contiguous class
            indices.
        counts: number of problems of each kind, for any use.
        has_decoded: whether every image was decoded.
        problems: all of them, or the first ones of each kind, for any use.
    """

    json_file: str
    image_root: str
    training: bool | None
    num_images: int
    num_annotations: int
    num_crowds: int
    num_unannotated: int
    categories: tuple[Category, ...]
    counts: dict[Kind, int]
    has_decoded: bool
    problems: tuple[Problem, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(category.name for category in self.categories)

    def severity(self, kind: Kind) -> str | None:
        """Return "error", "warning", or None where a kind does not matter for the use."""
        if kind.training is None or kind.training == self.training:
            return kind.severity
        return "warning" if self.training is None else None

    def kinds(self, severity: str) -> list[Kind]:
        """Return the kinds of problems that have a severity, in the order of discovery."""
        return [kind for kind in self.counts if self.severity(kind) == severity]

    def count(self, severity: str) -> int:
        """Return the number of problems that have a severity."""
        return sum(self.counts[kind] for kind in self.kinds(severity))

    def is_accepted(self, training: bool | None) -> bool:
        """Return whether the data can be used for training, for evaluation, or for one of them."""
        if training is None:
            return self.is_accepted(True) or self.is_accepted(False)
        return not self.for_use(training).kinds("error")

    def examples(self, kind: Kind) -> list[Problem]:
        """Return the problems of a kind that were kept."""
        return [problem for problem in self.problems if problem.kind == kind]

    def for_use(self, training: bool | None) -> "CocoReport":
        """Return the report on the same file for a use."""
        return replace(self, training=training)


def validate_coco(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    *,
    training: bool | None = None,
    max_pixels: int = MAX_PIXELS,
    mask_format: str = "",
    num_keypoints: int = 0,
    limit: int | None = None,
    pixels: bool = False,
) -> CocoReport:
    """Find all that is wrong with a COCO json file and its images, and count what it holds.

    Args:
        json_file: COCO instances json; anything that detectron2's PathManager reads.
        image_root: the local folder that the images' ``file_name`` is relative to.
        training: True for a training set, which must hold annotations; False for an evaluation
            set, whose annotations must have the ``area`` and ``iscrowd`` that the COCO metrics
            need; None where the use is not known, which makes such problems warnings.
        max_pixels: largest product of an image's height and width.
        mask_format: "polygon" or "bitmask", as ``INPUT.MASK_FORMAT``, where masks are used.
        num_keypoints: as ``MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS`` where keypoints are used.
        limit: problems of each kind to keep; all are counted.
        pixels: decode every image as well, with a progress bar.

    Raises:
        FileNotFoundError: if the json file or the folder is missing.
    """
    check_exists(json_file, image_root)
    walk = _Walk(image_root, max_pixels, mask_format, num_keypoints, limit)
    # COCO's millions of objects, none of them garbage, would make the garbage collection run again
    # and again, for more than half of the time.
    with no_garbage_collection():
        walk.through(json_file)
    if pixels:
        walk.decode_images()
    return CocoReport(
        json_file=os.fspath(json_file),
        image_root=os.fspath(image_root),
        training=training,
        num_images=walk.sizes["images"],
        num_annotations=walk.sizes["annotations"],
        num_crowds=walk.num_crowds,
        num_unannotated=len(walk.image_sizes) - len(walk.annotated),
        categories=tuple(
            Category(identity, name, walk.boxes[identity], walk.keypoints[identity])
            for identity, name in sorted(walk.names.items())
        ),
        counts=dict(walk.counts),
        has_decoded=pixels,
        problems=tuple(problem for problem in walk.problems if problem.kind in walk.counts),
    )


def check_exists(json_file: str | os.PathLike, image_root: str | os.PathLike) -> None:
    """Raise FileNotFoundError if a json file or its image folder is missing."""
    require_file("json file", PathManager.get_local_path(os.fspath(json_file)))
    if not os.path.isdir(image_root):
        raise FileNotFoundError(f"image folder {image_root} of {json_file} does not exist")


class _Walk:
    """Walks through a COCO json file, collects its problems, and counts what it holds."""

    def __init__(
        self,
        image_root: str | os.PathLike,
        max_pixels: int,
        mask_format: str,
        num_keypoints: int,
        limit: int | None,
    ):
        self._image_root, self._max_pixels, self._limit = image_root, max_pixels, limit
        self._mask_format, self._num_keypoints = mask_format, num_keypoints
        self.counts: Counter[Kind] = Counter()
        self.problems: list[Problem] = []  # up to the limit of each kind
        self.sizes: Counter[str] = Counter()  # number of entries by section
        self.names: dict[int, str] = {}  # of the categories by id
        self.keypoints: dict[int, tuple[str, ...]] = {}  # their names, likewise
        self.boxes: Counter[int] = Counter()  # annotations, without crowds, by id of the category
        self.image_sizes: dict[int, tuple[int, int] | None] = {}  # (height, width) by id, if valid
        self.annotated: set[int] = set()  # ids of the images that have annotations
        self.num_crowds = self._num_left_out = 0
        self._seen: dict[tuple[str, str], dict[Any, int]] = defaultdict(dict)
        self._objects: set[int] = set()
        self._files: dict[int, dict[str, Any]] = {}  # fields of the images whose file is there

    def through(self, json_file: str | os.PathLike) -> None:
        """Find the problems of a file, those first that others may follow from."""
        reading = reading_of(json_file)
        for problem in reading.problems if reading else ():
            self._add(problem.kind, problem.message)
        # That nothing is there follows from these.
        is_unread = reading is not None and reading.num_left_out > 0
        try:
            content = _read(json_file)
        except ValueError as error:
            for clause in error.args:
                self._add(problems.NOT_COCO, clause)
            return
        examine = [self._category, self._image, self._annotation]
        for section, find in zip(FIELDS, examine, strict=True):
            self.sizes[section] = len(content[section])
            if not content[section] and section in _NEEDED and not is_unread:
                clause = f"{section!r} is empty; at least one {_NEEDED[section]} is needed"
                self._add(problems.EMPTY_SECTION, clause)
            for index, entry in enumerate(content[section]):
                valid, found = check_fields(section, index, entry, self._seen)
                if isinstance(entry, dict):
                    found += find(index, entry, valid)
                    if reading and "source" in entry:
                        valid["source"] = entry["source"]
                for kind, clause in found:
                    self._add_of(section, index, valid, kind, f" {clause}")
        if reading:
            self.sizes["images"] += reading.num_left_out
        if self.counts[problems.CORNER_BOX] <= _CORNERS_SHARE * self.sizes["annotations"]:
            del self.counts[problems.CORNER_BOX]
        if content["annotations"] or not is_unread:
            self._find_useless_annotations()
        self._find_missing_files()

    def decode_images(self) -> None:
        """Find the problems of decoding the images whose file is there, with a progress bar."""
        for index, image in tqdm(self._files.items(), desc="Images", unit=""):
            path = os.path.join(self._image_root, image["file_name"])
            try:
                check_size(path, read_image(path, self._max_pixels), _size(image))
            except ImageError as error:
                self._add_of("images", index, image, problems.UNREADABLE, f": {error}")

    def _add(self, kind: Kind, *details: Any) -> None:
        self.counts[kind] += 1
        if self._limit is None or self.counts[kind] <= self._limit:
            self.problems.append(Problem(kind, *details))

    def _add_of(
        self, section: str, index: int, valid: dict[str, Any], kind: Kind, clause: str
    ) -> None:
        """Add a problem of an entry, whose name the clause is appended to.

        In converted annotations, the name is the place in the file that it is from.
        """
        identity, image_id = valid.get("id"), valid.get("image_id")
        known = [f"id {identity}"] if identity is not None else []
        known += [f"of image {image_id}"] if image_id is not None else []
        where = f"{section}[{index}]" + (f" ({' '.join(known)})" if known else "")
        where = valid.get("source", where)
        ids = {"images": [identity], "annotations": [image_id, identity]}.get(section, [])
        self._add(kind, where + clause, *ids)

    def _category(self, index: int, entry: dict, valid: dict) -> list[Finding]:
        if valid.keys() == {"id", "name"}:
            self.names.setdefault(valid["id"], valid["name"])
            self.keypoints.setdefault(valid["id"], keypoint_names(valid))
        return []

    def _image(self, index: int, entry: dict, valid: dict) -> list[Finding]:
        size = _size(valid)
        if "id" in valid:
            self.image_sizes.setdefault(valid["id"], size)
        if "file_name" in valid:
            self._files[index] = valid
        if size and size[0] * size[1] > self._max_pixels:
            clause = f"has {size[1]} x {size[0]} pixels, more than the {self._max_pixels:,} that "
            return [(problems.TOO_LARGE, clause + "max_pixels (INPUT.MAX_PIXELS) allows")]
        return []

    def _annotation(self, index: int, entry: dict, valid: dict) -> list[Finding]:
        size, is_crowd = None, valid.get("iscrowd") == 1
        self.num_crowds += is_crowd
        if "image_id" in valid:
            size = self.image_sizes[valid["image_id"]]
            self.annotated.add(valid["image_id"])
        if "category_id" in valid and not is_crowd:
            self.boxes[valid["category_id"]] += 1
        found = []
        if valid.get("id") == 0:
            found.append((problems.ID_ZERO, "has the id 0, which pycocotools treats as no match"))
        elif valid.get("id", 0) < 0:
            found.append((problems.NEGATIVE_ID, f"has the id {valid['id']}; it must be >= 0"))
        if needed := [repr(key) for key in ("area", "iscrowd") if key not in entry]:
            clause = f"lacks {' and '.join(needed)}, which the COCO metrics need"
            found.append((problems.MISSING_FOR_AP, clause))
        if "bbox" in valid:
            found += box_problems(entry, size)
        if {"image_id", "category_id", "bbox"} <= valid.keys():
            # Of a million annotations the objects themselves would take too much memory.
            key = hash((valid["image_id"], valid["category_id"], is_crowd, *valid["bbox"]))
            if key in self._objects:
                clause = f"has image, class and bbox {shown(valid['bbox'])} of another one"
                found.append((problems.DUPLICATE, clause))
            self._objects.add(key)
        found += mask_problems(entry.get("segmentation"), size, self._mask_format, is_crowd)
        found += keypoints_problems(entry, self._num_keypoints)
        self._num_left_out += is_crowd or any(
            self._mask_format in kind.left_out_with for kind, _ in found
        )
        return found

    def _find_useless_annotations(self) -> None:
        """Find what leaves nothing to train on or to evaluate."""
        number = self.sizes["annotations"]
        if not number:
            clause = "'annotations' is empty; a training set needs at least one annotation"
            self._add(problems.NOTHING_TO_TRAIN_ON, clause)
            kind = problems.BAD_KEYPOINTS_FOR_AP if self._num_keypoints else problems.NO_AP
            self._add(kind, "'annotations' is empty: AP cannot be computed")
            return
        if self._num_left_out == number:
            what = "crowds"
            if self.num_crowds < number:
                what += ", or without a box in their image and the mask or keypoints to be trained"
            clause = f"all 'annotations' are {what}: training leaves them out"
            self._add(problems.NOTHING_TO_TRAIN_ON, clause)
        for identity, name in self.names.items():
            if not self.boxes[identity]:
                self._add(
                    problems.UNUSED_CLASS, f"category {identity} ({shown(name)}) has no boxes"
                )

    def _find_missing_files(self) -> None:
        """Find the problems of the images' files, and forget those that cannot be used."""
        names = {index: image["file_name"] for index, image in self._files.items()}
        for index, is_unsafe, clause in check_image_files(self._image_root, names):
            kind = problems.UNSAFE_FILE if is_unsafe else problems.MISSING_FILE
            self._add_of("images", index, self._files.pop(index), kind, f": {clause}")


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    """Return the (height, width) of an image from its valid fields, if both are there."""
    return (image["height"], image["width"]) if {"height", "width"} <= image.keys() else None


def _read(json_file: str | os.PathLike) -> dict[str, Any]:
    """Read a file; a ValueError has the clauses that say why it does not hold COCO instances."""
    path = PathManager.get_local_path(os.fspath(json_file))
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    # A UnicodeDecodeError is a ValueError, as json's own error is.
    except ValueError as error:
        reason = f"is not JSON: {error}" if os.path.getsize(path) else "is empty"
        raise ValueError(reason) from error
    except RecursionError as error:
        raise ValueError("is not COCO instances: it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"must hold a JSON object (COCO instances), not {described(content)}")
    clauses = []
    for section in ("images", "annotations", "categories"):
        if section not in content:
            clauses.append(
                f"lacks {section!r}; COCO instances have 'images', 'annotations' and "
                "'categories', without which nothing can be learned and no AP be computed"
            )
        elif not isinstance(content[section], list):
            clauses.append(f"{section!r} must be a list, not {described(content[section])}")
    if clauses:
        raise ValueError(*clauses)
    return content

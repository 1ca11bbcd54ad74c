"""What is wrong with a COCO json file and its images, all of it."""

import gc
import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

from detectron2.utils.file_io import PathManager

from ..config import MAX_PIXELS
from .coco_content import CocoContent

__all__ = ["CocoReport", "check_exists", "validate_coco"]


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

"""Readers of annotation formats other than COCO's, which gather content and faults.

Libraries that convert formats were tried first: globox 2.9.0, labelformat 0.1.17 and hotcoco 1.3.0,
on files with one fault of each kind. globox ends at the first fault with an assertion that names no
file, labelformat leaves out lines that it cannot read, and hotcoco writes boxes of NaN. All of them
believe the sizes of images that annotations have, and globox and hotcoco sort the classes of Pascal
VOC in each folder. What is left for a library, once a training needs to know all of that before it
starts, is a few lines for each format.
"""

from .builder import Converted, without_sources
from .cvat import read_cvat
from .labelme import read_labelme
from .voc import read_voc, voc_splits
from .yolo import read_yolo, yolo_splits

__all__ = [
    "Converted",
    "read_cvat",
    "read_labelme",
    "read_voc",
    "read_yolo",
    "voc_splits",
    "without_sources",
    "yolo_splits",
]

"""Readers of annotation formats other than COCO's, whose content and faults they gather.

Libraries that convert formats were tried first: globox 2.9, labelformat 0.1.17 and hotcoco 1.3 on
files with one fault of each kind. globox ends at the first fault with an assertion that names no
file, labelformat leaves lines out that it cannot read, hotcoco writes boxes of NaN; none looks at
the image files for their sizes and their orientation. globox and hotcoco also number the classes of
Pascal VOC anew for each folder, and globox reads no masks. A training must know all of that before
it starts, so that what they leave is a few lines for each format.
"""

from .builder import Converted
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
    "yolo_splits",
]

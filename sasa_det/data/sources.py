"""Data that a command line or a config names, opened as COCO instances."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from itertools import count
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from ..data_arguments import DEFAULT_SPLITS, data_format
from .coco_entries import Problem
from .formats import Converted, read_voc, read_yolo, voc_splits


class Reading(NamedTuple):
    """What became of annotations in another format than COCO's.

    Attributes:
        path: of a temporary json file with them.
        image_root: the folder of the images.
        problems: what it does not hold, because it cannot be read.
        num_left_out: images that it does not hold.
        sources: the files that were read.
    """

    path: str
    image_root: str
    problems: tuple[Problem, ...] = ()
    num_left_out: int = 0
    sources: frozenset[str] = frozenset()


_readings: dict[str, Reading] = {}


def open_data(
    path: str, where: str = "", use: str = "train", *, reuse: bool = False
) -> tuple[str, str]:
    """Return the json file and image folder of data in any format that can be trained on.

    What is not in COCO's format is read, and the result kept in a temporary json file, which
    detectron2's PathManager finds under the name that is returned, as ``data.yaml:train``. What
    cannot be read is found by :func:`sasa_det.data.validate_coco` on that name.

    Args:
        path: COCO json, YOLO data.yaml, or Pascal VOC folder.
        where: the image folder of a json, or the split of others; "" for the one that is usual.
        use: "train" or "test", which says what is usual: train and val.
        reuse: do not read again what this process has read.

    Raises:
        DatasetError: if the data.yaml or the folder cannot be used.
        FileNotFoundError: if it does not exist.
    """
    kind = data_format(path)
    if kind == "coco":
        return path, where
    if kind == "yolo":
        split = where or DEFAULT_SPLITS[use]
        return open_converted(f"{path}:{split}", lambda: read_yolo(path, split), reuse=reuse)
    has_splits = os.path.isdir(path) and voc_splits(path)
    split = where or (DEFAULT_SPLITS[use] if has_splits else "")
    name = f"{path.rstrip(os.sep)}:{split or 'all'}"
    return open_converted(name, lambda: read_voc(path, split), reuse=reuse)


def open_converted(
    name: str, read: Callable[[], Converted], *, reuse: bool = False
) -> tuple[str, str]:
    """Keep converted data in a temporary json file, and return its name and the image folder.

    Args:
        name: to find it by.
        read: reads and converts the data.
        reuse: do not read again what this process has read.
    """
    if reuse and name in _readings:
        return name, _readings[name].image_root
    converted = read()
    text = json.dumps(converted.content)
    found = converted.image_root, converted.problems, converted.num_left_out, converted.sources
    old = _readings.get(name)
    if old is None or old[1:] != found or _text(old.path) != text:
        path = os.path.join(_folder(), f"{next(_numbers)}.json")
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        if old is not None:
            os.unlink(old.path)
            # It was registered with what the files held before.
            for catalog in (DatasetCatalog, MetadataCatalog):
                catalog.pop(name, None)
    else:
        path = old.path
    _readings[name] = Reading(path, *found)
    PathManager.register_handler(_Converted(name), allow_override=True)
    return name, converted.image_root


def reading_of(json_file: str | os.PathLike) -> Reading | None:
    """Return what became of annotations in another format; None for a json file."""
    return _readings.get(os.fspath(json_file))


_numbers = count()


@cache
def _folder() -> str:
    folder = tempfile.mkdtemp(prefix="sasa_det_")
    # At the end of this process, a worker of a run as well, for which atexit does nothing; not of
    # those that are forked from it.
    Finalize(None, shutil.rmtree, (folder, True), exitpriority=0)
    return folder


def _text(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


class _Converted(PathHandler):
    """Finds the temporary file of converted annotations; only their name is handled."""

    def __init__(self, name: str):
        super().__init__()
        self._name = name

    def _get_supported_prefixes(self) -> list[str]:
        return [self._name]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return _readings[path].path if path in _readings else path

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        return open(self._get_local_path(path), mode, buffering, **kwargs)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return os.path.exists(self._get_local_path(path))

    _isfile = _exists

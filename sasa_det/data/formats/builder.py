"""COCO instances built from annotations of another format, with what is wrong with these."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...errors import DatasetError, ImageError, nearest
from ...utils.text import abbreviated_list
from .. import coco_entries as problems
from ..coco_entries import Kind, Problem, shown
from ..images import image_size

# Names of files that list the classes of data whose format has no place for it.
CLASS_FILES = ("classes.txt", "labels.txt", "labelmap.txt")

_SHOWN = 10


@dataclass(frozen=True)
class Converted:
    """A data set in COCO's format.

    Attributes:
        content: COCO instances; each entry says under "source" where it is from.
        image_root: the folder that the images' ``file_name`` is relative to.
        problems: what is not in the content, because it cannot be read.
        num_left_out: images that are not in the content.
        sources: the files that were read.
    """

    content: dict[str, Any]
    image_root: str
    problems: tuple[Problem, ...]
    num_left_out: int
    sources: frozenset[str]


class ImageEntry(NamedTuple):
    """An image of the content, and the size of the oriented image in its file."""

    id: int
    width: int
    height: int


@dataclass
class CocoBuilder:
    """Gathers images and objects, and what is wrong with them.

    Attributes:
        class_names: in the order of the class indices; ids of categories are indices + 1.
        names_source: what the class names are from, for messages.
    """

    class_names: Sequence[str]
    names_source: str
    sources: set[str] = field(default_factory=set)
    num_left_out: int = 0
    _images: list[dict[str, Any]] = field(default_factory=list)
    _annotations: list[dict[str, Any]] = field(default_factory=list)
    _problems: list[Problem] = field(default_factory=list)

    def add_problem(self, kind: Kind, message: str) -> None:
        """Add what is wrong, as a sentence that begins with the name of a file."""
        self._problems.append(Problem(kind, message))

    def add_image(
        self, path: str, listed_in: str = "", size: tuple[int, int] | None = None
    ) -> ImageEntry | None:
        """Add an image of the size that its file has, turned as EXIF says.

        Args:
            path: of the file.
            listed_in: what names it, if it was not found in its folder.
            size: (width, height) in the annotations, if they have one.

        Returns:
            ImageEntry: None if the file cannot be used, or the annotations are for another size.
        """
        named = f"{listed_in}: " if listed_in else ""
        try:
            width, height = image_size(path)
        except ImageError as error:
            kind = problems.UNREADABLE if os.path.lexists(path) else problems.MISSING_FILE
            self.add_problem(kind, f"{named}{error}")
            self.num_left_out += 1
            return None
        if size is not None and size != (width, height):
            self.add_problem(
                problems.WRONG_SIZE,
                f"{named}image {path} has {width} x {height} pixels, but its annotations are for "
                f"{size[0]} x {size[1]}",
            )
            self.num_left_out += 1
            return None
        entry = ImageEntry(len(self._images) + 1, width, height)
        # A link is kept as the file that it stands for: links out of the image folder are refused.
        self._images.append(
            {
                "id": entry.id,
                "file_name": os.path.realpath(path),
                "width": width,
                "height": height,
                "source": path,
            }
        )
        return entry

    def class_index(self, name: object, where: str) -> int | None:
        """Return the index of a class by its name; an unknown one is added to the problems."""
        if name in self.class_names:
            return self.class_names.index(name)
        listed = abbreviated_list(self.class_names, _SHOWN) or "none"
        self.add_problem(
            problems.UNKNOWN_CLASS,
            f"{where} is of class {shown(name)}, which is not one of {self.names_source}: {listed}"
            f"{nearest(str(name), self.class_names)}".removesuffix("."),
        )
        return None

    def add_object(
        self,
        image: ImageEntry,
        class_index: int,
        corners: Sequence[float],
        where: str,
        *,
        polygon: Sequence[float] = (),
        is_crowd: bool = False,
    ) -> None:
        """Add an object.

        Args:
            image: which it is in.
            class_index: of its class.
            corners: x0, y0, x1, y1 of its box in pixels.
            where: the file and the place in it.
            polygon: x0, y0, x1, y1 and so on of its mask.
            is_crowd: whether evaluation does not count it, and training leaves it out.
        """
        x0, y0, x1, y1 = corners
        entry = {
            "id": len(self._annotations) + 1,
            "image_id": image.id,
            "category_id": class_index + 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": _area(polygon) if polygon else max(x1 - x0, 0) * max(y1 - y0, 0),
            "iscrowd": int(is_crowd),
            "source": where,
        }
        if polygon and not is_crowd:
            entry["segmentation"] = [list(polygon)]
        self._annotations.append(entry)

    def add_polygon(
        self, image: ImageEntry, class_index: int, polygon: Sequence[float], where: str
    ) -> None:
        """Add an object by its mask, which its box is tight around."""
        xs, ys = polygon[::2], polygon[1::2]
        corners = min(xs), min(ys), max(xs), max(ys)
        self.add_object(image, class_index, corners, where, polygon=polygon)

    def finish(self, folders: Iterable[str]) -> Converted:
        """Return what was gathered, with the images relative to the folder that has all of them.

        Args:
            folders: that the images were looked for in; those of listed images are not needed.
        """
        paths = [image["file_name"] for image in self._images]
        roots = {*map(os.path.realpath, folders), *map(os.path.dirname, paths)}
        root = os.path.commonpath(roots) if roots else os.getcwd()
        images = [
            {**image, "file_name": os.path.relpath(image["file_name"], root)}
            for image in self._images
        ]
        categories = [
            {"id": index + 1, "name": name, "source": self.names_source}
            for index, name in enumerate(self.class_names)
        ]
        content = {
            "info": {},
            "licenses": [],
            "images": images,
            "annotations": self._annotations,
            "categories": categories,
        }
        return Converted(
            content, root, tuple(self._problems), self.num_left_out, frozenset(self.sources)
        )


def _area(polygon: Sequence[float]) -> float:
    xs, ys = polygon[::2], polygon[1::2]
    turned = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
    return abs(sum(x0 * y1 - x1 * y0 for x0, y0, x1, y1 in turned)) / 2


def number(text: object) -> float:
    """Read a number from the text of a file.

    Raises:
        ValueError: with a clause, if it is no finite number.
    """
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"has {shown(text)} where a number is needed")
    return value


def stated_size(width: str, height: str) -> tuple[int, int] | None:
    """Return the (width, height) of an image from the text of a file; None if it has none.

    Tools that do not know a size write 0.
    """
    size = tuple(int(text) if text.isdecimal() else 0 for text in (width, height))
    return size if all(size) else None


def without_sources(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Leave out where entries are from, which is of use only beside the files."""
    return [{key: entry[key] for key in entry if key != "source"} for entry in entries]


def listed_classes(folder: str) -> tuple[list[str], str] | None:
    """Return the class names that a file in a folder or the one above lists, and the file.

    Args:
        folder: of the data.

    Returns:
        tuple: None if there is none of :data:`CLASS_FILES`.
    """
    for place in (folder, os.path.dirname(os.path.abspath(folder))):
        for name in CLASS_FILES:
            path = os.path.join(place, name)
            if os.path.isfile(path):
                lines = [line.strip() for line in read_text(path).splitlines()]
                # CVAT's labelmap.txt has name:color:parts:actions, labelme's labels.txt two more.
                names = [
                    line.partition(":")[0] if name == "labelmap.txt" else line
                    for line in lines
                    if line and not line.startswith("#")
                ]
                return [n for n in names if n not in _NO_CLASSES], path
    return None


_NO_CLASSES = ("__ignore__", "_background_", "background")


def classes_of(folder: str, found: Iterable[str]) -> tuple[list[str], str]:
    """Return the classes of data whose format has no list of them, and what they are from.

    Args:
        folder: of the data, where a file may list them.
        found: names in the annotations, which are sorted where there is no such file.
    """
    return listed_classes(folder) or (sorted(set(found)), f"the classes in {folder}")


def read_text(path: str) -> str:
    """Read a text file; a DatasetError names one that cannot be read."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text") from error


def split_hint(splits: Mapping[str, object] | Sequence[str]) -> str:
    """Say which splits there are, for a message."""
    return f"it has {abbreviated_list(list(splits), _SHOWN)}" if splits else "it has none"

"""Data sets in Pascal VOC's format: an XML file of objects for each image."""

import os
import re
from itertools import chain
from xml.etree.ElementTree import Element

from ...errors import DatasetError
from ...utils.files import require_folder
from .. import coco_entries as problems
from ..media import IMAGE_SUFFIXES
from .builder import CocoBuilder, Converted, classes_of, number, read_text, split_hint, stated_size
from .files import files_in, progress
from .xml import parse_xml

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def voc_splits(folder: str) -> list[str]:
    """Return the names of the splits of a VOC folder, without those of single classes.

    Empty if the folder has no ImageSets/Main.
    """
    lists = os.path.join(folder, "ImageSets", "Main")
    if not os.path.isdir(lists):
        return []
    names = sorted(name[:-4] for name in os.listdir(lists) if name.endswith(".txt"))
    # VOC has a list of each class in each split, aeroplane_train, beside that of the split.
    return [name for name in names if name.rpartition("_")[2] not in names or "_" not in name]


def read_voc(folder: str, split: str = "") -> Converted:
    """Read a split of a Pascal VOC folder, or a folder with XML files beside its images.

    Corners of boxes are indices of pixels that count from 1, and the last is in the box: as in
    detectron2's own loader, 1 is subtracted from xmin and ymin. Objects that are difficult become
    crowds, which evaluation does not count and training leaves out. Images without objects have an
    XML file all the same: one without is not annotated, and is left out.

    The classes of both kinds are those that classes.txt in the folder or the one above lists, in
    its order, or all in the XML files of the folder, whatever the split, in alphabetical order.

    Args:
        folder: with JPEGImages, Annotations and ImageSets/Main, or with XML files and images at any
            depth.
        split: the name of a list in ImageSets/Main; "" for all XML files.

    Raises:
        DatasetError: if there are no XML files, or there is no such split.
        FileNotFoundError: if the folder does not exist.
    """
    require_folder("data folder", folder)
    annotations = _subfolder(folder, "Annotations")
    xml_files = sorted(files_in(annotations or folder, {".xml"}))
    if not xml_files:
        raise DatasetError(
            f"data folder {folder} has no XML files of Pascal VOC; for COCO, give the json and the "
            "image folder, and for YOLO its data.yaml"
        )
    roots, faults = {}, {}
    for path in progress(xml_files, "Reading XML files", "file"):
        try:
            roots[path] = _parse(path)
        except DatasetError as error:
            faults[path] = str(error)
    found = (
        entry.findtext("name", "").strip() for root in roots.values() for entry in _objects(root)
    )
    names, names_source = classes_of(folder, filter(None, found))
    builder = CocoBuilder(names, names_source, set(xml_files))
    if annotations:
        images = _subfolder(folder, "JPEGImages") or _subfolder(folder, "images") or folder
        pairs = _listed(folder, split, annotations, images, xml_files)
        folders = [images]
    else:
        if split:
            raise DatasetError(
                f"data folder {folder} has no ImageSets/Main, so that there is no split {split!r} "
                "to choose"
            )
        pairs = _side_by_side(folder, roots, faults)
        folders = [folder]
    for image_path, xml_file, listed_in in progress(pairs, "Reading sizes", "image"):
        if xml_file in faults:
            builder.add_problem(problems.UNREADABLE_ANNOTATIONS, faults[xml_file])
            builder.num_left_out += 1
        elif xml_file in roots:
            _add(builder, image_path, xml_file, roots[xml_file], listed_in)
        elif listed_in:
            builder.add_problem(
                problems.UNREADABLE_ANNOTATIONS, f"{listed_in}: {xml_file} does not exist"
            )
            builder.num_left_out += 1
        else:
            builder.add_problem(problems.UNUSED_IMAGE, f"image {image_path} has no XML file")
    return builder.finish(folders)


def _subfolder(folder: str, name: str) -> str | None:
    """Return a folder in another by its name in any capitals."""
    for entry in sorted(os.listdir(folder)):
        path = os.path.join(folder, entry)
        if entry.lower() == name.lower() and os.path.isdir(path):
            return path
    return None


def _parse(path: str) -> Element:
    root = parse_xml(path)
    if root.tag != "annotation":
        raise DatasetError(f"{path} must hold an <annotation> of Pascal VOC, not <{root.tag}>")
    return root


def _objects(root: Element) -> list[Element]:
    return root.findall("object")


# Lists of single classes have 1, 0 or -1 behind the name.
_CLASS_FLAG = re.compile(r"\s+-?[01]$")

# Of an image its path, its XML file and what names it, "" without one.
_Pair = tuple[str, str, str]


def _stem(path: str, folder: str) -> str:
    """Return what the files of an image have in common: the path in a folder without a suffix."""
    return os.path.splitext(os.path.relpath(path, folder))[0]


def _images_by_stem(folder: str) -> dict[str, list[str]]:
    by_stem: dict[str, list[str]] = {}
    for path in sorted(files_in(folder, IMAGE_SUFFIXES)):
        by_stem.setdefault(_stem(path, folder), []).append(path)
    return by_stem


def _listed(
    folder: str, split: str, annotations: str, images: str, xml_files: list[str]
) -> list[_Pair]:
    xml_by_stem = {_stem(path, annotations): path for path in xml_files}
    by_stem = _images_by_stem(images)
    unlabelled = []
    if split:
        list_file = os.path.join(folder, "ImageSets", "Main", f"{split}.txt")
        if not os.path.isfile(list_file):
            raise DatasetError(
                f"data folder {folder} has no split {split!r} in ImageSets/Main; "
                f"{split_hint(voc_splits(folder))}"
            )
        lines = map(str.strip, read_text(list_file).splitlines())
        stems = [
            (
                line if line in by_stem else _CLASS_FLAG.sub("", line),
                f"{list_file} line {index + 1}",
            )
            for index, line in enumerate(lines)
            if line
        ]
        if not stems:
            raise DatasetError(f"{list_file} is empty")
    else:
        stems = list(xml_by_stem.items())
        unlabelled = [(by_stem[stem][0], "", "") for stem in by_stem if stem not in xml_by_stem]
    pairs = []
    for stem, listed_in in stems:
        path = by_stem.get(stem, [os.path.join(images, f"{stem}.jpg")])[0]
        xml_file = xml_by_stem.get(stem, os.path.join(annotations, f"{stem}.xml"))
        pairs.append((path, xml_file, listed_in))
    return [*pairs, *unlabelled]


def _side_by_side(folder: str, roots: dict[str, Element], faults: dict[str, str]) -> list[_Pair]:
    by_stem = _images_by_stem(folder)
    pairs, used = [], set()
    for xml_file in sorted([*roots, *faults]):
        named = ""
        if xml_file in roots:
            named = os.path.basename(roots[xml_file].findtext("filename", "").strip())
        beside = os.path.join(os.path.dirname(xml_file), named)
        same_stem = by_stem.get(_stem(xml_file, folder), [])
        # The file name in it is wrong where files were renamed.
        image = beside if beside in same_stem or not same_stem else same_stem[0]
        image = image if named or same_stem else f"{os.path.splitext(xml_file)[0]}.jpg"
        used.add(image)
        pairs.append((image, xml_file, xml_file))
    images = chain.from_iterable(by_stem.values())
    pairs += [(path, "", "") for path in images if path not in used]
    return sorted(pairs)


def _add(
    builder: CocoBuilder, image_path: str, xml_file: str, root: Element, listed_in: str
) -> None:
    size = stated_size(*(root.findtext(f"size/{side}", "").strip() for side in ("width", "height")))
    image = builder.add_image(image_path, listed_in, size)
    if image is None:
        return
    for index, entry in enumerate(_objects(root)):
        where = f"{xml_file} object {index + 1}"
        try:
            corners = _corners(entry)
        except ValueError as error:
            builder.add_problem(problems.BAD_OBJECT, f"{where} {error}")
            continue
        class_index = builder.class_index(entry.findtext("name", "").strip(), where)
        if class_index is not None:
            is_difficult = entry.findtext("difficult", "0").strip() == "1"
            builder.add_object(image, class_index, corners, where, is_crowd=is_difficult)


def _corners(entry: Element) -> list[float]:
    if entry.find("bndbox") is None:
        raise ValueError("has no <bndbox>")
    x0, y0, x1, y1 = (number(entry.findtext(f"bndbox/{name}")) for name in _CORNERS)
    return [x0 - 1, y0 - 1, x1, y1]

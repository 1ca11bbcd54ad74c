"""Detections as COCO results and as CSV."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances

from ..utils.files import whole_file, write_text

_COLUMNS = ("file_name", "frame", "class_id", "class_name", "score", "x0", "y0", "x1", "y1")


class Predictions:
    """The detections of many images, to be written at the end.

    ``results`` are those that ``pycocotools.coco.COCO.loadRes`` reads: one dict for each object
    with "image_id", "category_id", "bbox" (X0, Y0, width, height in pixels), "score" and, of
    R-CNNs with them, "segmentation" and "keypoints". "file_name", and "frame" of a video, say which
    image it is.
    """

    def __init__(
        self,
        class_name: Callable[[int], str],
        category_id: Callable[[int], int],
        num_classes: int | None = None,
    ):
        """
        Args:
            class_name: returns the name of a class index.
            category_id: returns its id.
            num_classes: to list all classes in the file of the images, if it is known.
        """
        self._class_name, self._category_id = class_name, category_id
        self._num_classes = num_classes
        self.results: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []
        self._rows: list[tuple[Any, ...]] = []

    def add(
        self,
        instances: Instances,
        file_name: str,
        *,
        frame: int | None = None,
        image_id: int | None = None,
    ) -> None:
        """Add the detections of an image.

        Args:
            instances: on the CPU.
            file_name: of the image or its video.
            frame: number of the image in its video, from 0.
            image_id: by default, the number of the image, from 1.
        """
        image_id = len(self._images) + 1 if image_id is None else image_id
        place = {"file_name": file_name} | ({} if frame is None else {"frame": frame})
        height, width = instances.image_size
        self._images.append({"id": image_id, "width": width, "height": height, **place})
        for result in instances_to_coco_json(instances, image_id):
            index = result["category_id"]
            x0, y0, box_width, box_height = result["bbox"]
            corners = (x0, y0, x0 + box_width, y0 + box_height)
            result["category_id"] = self._category_id(index)
            self.results.append({**result, **place})
            row = (result["category_id"], self._class_name(index), result["score"], *corners)
            self._rows.append((file_name, "" if frame is None else frame, *row))

    def write_json(self, path: str | os.PathLike, images: str | os.PathLike | None = None) -> None:
        """Write the COCO results.

        Args:
            path: of the results.
            images: of another json, with the images and the classes, to load the results into;
                None if they are those of a data set.
        """
        if images is not None:
            used = {result["category_id"]: None for result in self.results}
            indices = range(self._num_classes or 0)
            names = {self._category_id(index): self._class_name(index) for index in indices}
            categories = [
                {"id": identity, "name": names.get(identity, f"class {identity}")}
                for identity in sorted({**names, **used})
            ]
            content = {
                "info": {"description": "images of predictions"},
                "images": self._images,
                "annotations": [],
                "categories": categories,
            }
            write_text(images, json.dumps(content))
        write_text(path, json.dumps(self.results))

    def write_csv(self, path: str | os.PathLike) -> None:
        """Write a table with a line for each object; boxes are their corners in pixels."""
        with whole_file(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(_COLUMNS)
            table.writerows(self._rows)


def images_path(path: str | os.PathLike) -> Path:
    """Return where the images of COCO results are listed: beside them, as ``NAME_images.json``."""
    path = Path(path)
    return path.with_name(f"{path.stem}_images.json")

"""Prediction from a command line: images and videos in, pictures and tables out."""

import argparse
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from detectron2.structures import Instances
from PIL import Image
from tqdm import tqdm

from ..command_line import add_config_arguments, positive_int, share, share_below_1
from ..config.defaults import default_config
from ..config.keys import all_keys
from ..data.coco import check_read
from ..data.media import Frame, Medium, count_images, find_media, media_of_coco, read_frames
from ..data.sources import open_data
from ..data_arguments import DATA_HELP, DataParser
from ..errors import ImageError, UsageError
from ..evaluation.drawing import draw_instances
from ..evaluation.predictions import Predictions, images_path
from ..model_zoo.published import find_sample_images
from ..utils.files import whole_file
from ..utils.text import abbreviated_list, printable
from .defaults import flush_denormals, log_to
from .outputs import check_output_file, check_output_folder, explained
from .predictor import Predictor
from .trained_model import TrainedModel, load_trained_model

logger = logging.getLogger(__name__)

# Pictures keep these formats; those of other images and videos become the first and .mp4.
_PICTURES = (".png", ".jpg", ".jpeg")

_JPEG_QUALITY = 95

_SHOWN = 3

_EPILOG = """
KEY VALUE pairs override the config of the model, as MODEL.DEVICE cpu, and come after a flag other
than --input. Exit status: 0 if at least one image could be read, 1 if none could, 2 if there is a
mistake in the command or the weights.
"""


def predict_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line that :func:`run_predict` takes."""
    parser = DataParser(description=description, epilog=_EPILOG)
    parser.add_argument(
        "--weights",
        required=True,
        metavar="FILE",
        help="checkpoint of a detector, model_final.pth, a file of sasa-det export, or the config "
        "of published weights, such as Digits/retinanet_SASA.yaml",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        metavar="INPUT",
        help="images, folders of images, glob patterns in quotes, and videos; by default, the "
        "sample images of published weights",
    )
    parser.add_data_argument(
        "test",
        help=f"{DATA_HELP.format(split='val')}; instead of --input, and the results have its ids "
        "of images and categories",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder for pictures and videos with what was found"
    )
    parser.add_argument("--json", metavar="FILE", help="file to write, of COCO results")
    parser.add_argument("--csv", metavar="FILE", help="file to write, a table of all objects")
    parser.add_argument(
        "--confidence-threshold",
        type=share,
        default=0.5,
        metavar="SCORE",
        help="lowest score of an object, 0.5 by default; to measure the AP of the results, 0.05",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=8,
        metavar="N",
        help="images or tiles that go through the model at once, 8 by default",
    )
    parser.add_argument(
        "--tile",
        type=positive_int,
        metavar="PIXELS",
        help="cut images into tiles of this height and width, for large images",
    )
    parser.add_argument(
        "--overlap",
        type=share_below_1,
        metavar="SHARE",
        help="share of a tile that the next one shows as well, 0.2 by default; objects should be "
        "smaller",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that exist in the place of outputs"
    )
    add_config_arguments(parser)
    return parser


def run_predict(args: argparse.Namespace) -> int:
    """Predict as a command line of :func:`predict_parser` says.

    Returns:
        int: exit status: 0, or 1 if no image could be read; nothing is written then.

    Raises:
        UsageError, CheckpointError: in one sentence, before anything is written.
    """
    flush_denormals()
    log_to(None)
    media, ids = _media(args)
    outputs = _Outputs(args, media)
    trained = load_trained_model(args.weights, config_file=args.config_file, opts=args.opts)
    predictions = Predictions(
        trained.class_name, _category_ids(trained, args.test, ids), trained.num_classes
    )
    predictor = Predictor(
        trained,
        score_threshold=args.confidence_threshold,
        batch_size=args.batch_size,
        tile=args.tile or 0,
        overlap=0.2 if args.overlap is None else args.overlap,
    )
    # Tiles of one image are a batch, and an image in tiles may be very large.
    num_images = 1 if args.tile else args.batch_size
    unreadable: list[str] = []
    count = 0
    total = sum(map(count_images, media))
    with tqdm(total=total, unit="image", desc="Predicting") as progress, outputs:
        for batch in _read_ahead(_batches(media, predictor.max_pixels, num_images)):
            frames = [frame for frame in batch if isinstance(frame, Frame)]
            for error in batch:
                if isinstance(error, ImageError):
                    unreadable.append(str(error.path))
                    tqdm.write(printable(f"Skipped: {error}"))
            found = predictor([frame.image for frame in frames])
            for frame, instances in zip(frames, found, strict=True):
                instances = instances.to("cpu")
                medium = frame.medium
                predictions.add(instances, medium.name, frame=frame.index, image_id=medium.image_id)
                outputs.draw(frame, instances, trained.class_name)
            count += len(frames)
            progress.update(len(batch))
        seconds = max(progress.format_dict["elapsed"], 1e-9)
    if unreadable:
        logger.warning(
            "%d of %d files could not be read: %s",
            len(unreadable),
            len(media),
            abbreviated_list(unreadable, _SHOWN),
        )
    if not count:
        logger.error("No image could be read, and nothing was written.")
        return 1
    outputs.write(predictions)
    logger.info(
        "%d objects with a score of at least %g in %d images, %.1f images/s; written to %s.",
        len(predictions.results),
        args.confidence_threshold,
        count,
        count / seconds,
        ", ".join(str(path) for path in (args.output, *outputs.tables) if path),
    )
    return 0


def _media(args: argparse.Namespace) -> tuple[list[Medium], dict[str, int]]:
    """Find what to predict on, and the ids of the categories of a COCO json."""
    words = args.input or []
    if not words and not args.test:
        words = find_sample_images(args.weights)
        if words:
            logger.info("There is no --input: these are the sample images of %s.", args.weights)
    if bool(words) == bool(args.test):
        raise UsageError("give images with --input, or a data set with --test.")
    if args.overlap is not None and not args.tile:
        raise UsageError("--overlap is for tiles: give their size with --tile.")
    if args.test:
        json_file, image_root = open_data(*args.test, use="test")
        check_read(json_file)
        return media_of_coco(json_file, image_root)
    known = all_keys(default_config())
    for word in words:
        if word in known and not os.path.lexists(word):
            raise UsageError(
                f"{word} stands among the words of --input; put the KEY VALUE pairs behind another "
                "flag, or behind --."
            )
    return find_media(words, leave_out=args.output), {}


def _category_ids(
    trained: TrainedModel, test: Sequence[str] | None, ids: dict[str, int]
) -> Callable[[int], int]:
    """Return what gives the id of a class index, by its name in a COCO json if there is one."""
    if not test or not ids:
        return trained.category_id
    number = trained.num_classes
    names = trained.class_names
    if not names and number == len(ids):
        return sorted(ids.values()).__getitem__
    missing = [name for name in names if name not in ids]
    if missing or not names:
        what = f"no category {missing[0]!r}" if missing else f"{len(ids)} categories"
        raise UsageError(
            f"{test[0]} has {what}, and the model has "
            f"{abbreviated_list(names, _SHOWN) or f'{number} classes without names'}: the classes "
            "must be the same."
        )
    return [ids[name] for name in names].__getitem__


def _batches(
    media: Iterable[Medium], max_pixels: int, size: int
) -> Iterator[list[Frame | ImageError]]:
    frames = _frames(media, max_pixels)
    while batch := list(islice(frames, size)):
        yield batch


def _frames(media: Iterable[Medium], max_pixels: int) -> Iterator[Frame | ImageError]:
    for medium in media:
        try:
            yield from read_frames(medium, max_pixels)
        except ImageError as error:
            yield error


def _read_ahead(batches: Iterator[list]) -> Iterator[list]:
    """Read a batch while the one before is worked on.

    One thread alone reads, for the limit on pixels that reading sets is the whole process'.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, batches, None)
        while (batch := future.result()) is not None:
            future = pool.submit(next, batches, None)
            yield batch


@dataclass
class _Video:
    """A video that is written, of what, and to which file until it is whole."""

    medium: Medium
    writer: cv2.VideoWriter
    part: Path
    num_frames: int = 0


def _num_frames(path: Path) -> int:
    video = cv2.VideoCapture(str(path))
    try:
        return int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    finally:
        video.release()


class _Outputs:
    """The files that a command writes; a video is written while its images are predicted on."""

    def __init__(self, args: argparse.Namespace, media: Sequence[Medium]):
        """Raise UsageError if a file must not be written, before anything is."""
        if not (args.output or args.json or args.csv):
            raise UsageError("there is nothing to write: give --output, --json or --csv.")
        self._folder = Path(args.output) if args.output else None
        self._json, self._csv = (Path(path) if path else None for path in (args.json, args.csv))
        # The images of a COCO json have one already.
        self._images = None if args.test or not self._json else images_path(self._json)
        self.tables = [path for path in (self._json, self._images, self._csv) if path]
        self._video: _Video | None = None
        self._stack = ExitStack()
        if len({os.path.abspath(path) for path in self.tables}) < len(self.tables):
            raise UsageError("--json and --csv must name different files.")
        for path in self.tables:
            check_output_file(path, overwrite=args.overwrite)
        if self._folder is not None:
            check_output_folder(self._folder, overwrite=args.overwrite)
        written = {os.path.realpath(path): str(path) for path in self.tables}
        sources = {os.path.realpath(path) for path in (args.weights, *(args.test or ())[:1])}
        sources |= {os.path.realpath(medium.path) for medium in media}
        for medium in media if self._folder is not None else ():
            path = self._picture(medium)
            if (real := os.path.realpath(path)) in written:
                raise UsageError(
                    f"{path} would be written twice, for {written[real]} and for {medium.path}: "
                    "give the folder that both are in, or one at a time."
                )
            written[real] = medium.path
        for path in sorted(sources & written.keys()):
            raise UsageError(f"{path} is an input, and must not be an output as well.")

    def __enter__(self) -> "_Outputs":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            with self._stack:  # which removes a video that is not whole
                self._end_video()
        else:
            if self._video is not None:
                self._video.writer.release()
            # The video is removed, for it is not whole.
            self._stack.__exit__(kind, error, trace)

    def draw(self, frame: Frame, instances: Instances, class_name: Callable[[int], str]) -> None:
        """Write the picture of an image, or the next one of a video."""
        if self._folder is None:
            return
        # A folder is locked while a file is written into it.
        if self._video is not None and self._video.medium is not frame.medium:
            self._end_video()
        rgb = draw_instances(frame.image[:, :, ::-1], instances, class_name)
        if frame.index is not None:
            self._add_to_video(frame, rgb)
            return
        with explained(self._folder), whole_file(self._picture(frame.medium)) as part:
            Image.fromarray(rgb).save(part, quality=_JPEG_QUALITY)

    def write(self, predictions: Predictions) -> None:
        """Write the tables."""
        if self._json:
            with explained(self._json):
                predictions.write_json(self._json, self._images)
        if self._csv:
            with explained(self._csv):
                predictions.write_csv(self._csv)

    def _picture(self, medium: Medium) -> Path:
        allowed = (".mp4",) if medium.is_video else _PICTURES
        suffix = "" if Path(medium.name).suffix.lower() in allowed else allowed[0]
        return self._folder / f"{medium.name}{suffix}"

    def _add_to_video(self, frame: Frame, rgb: np.ndarray) -> None:
        height, width = rgb.shape[:2]
        if self._video is None:
            with explained(self._folder):
                part = self._stack.enter_context(whole_file(self._picture(frame.medium)))
            code = cv2.VideoWriter_fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(part), code, frame.fps, (width, height))
            if not writer.isOpened():
                raise UsageError("this OpenCV cannot write mp4 videos; leave --output out.")
            self._video = _Video(frame.medium, writer, part)
        self._video.writer.write(np.ascontiguousarray(rgb[:, :, ::-1]))
        self._video.num_frames += 1

    def _end_video(self) -> None:
        video, self._video = self._video, None
        if video is None:
            return
        video.writer.release()
        # OpenCV does not say that it could not write, as on a full disk.
        if _num_frames(video.part) != video.num_frames:
            raise UsageError(
                f"{self._picture(video.medium)} could not be written whole; the disk may be full."
            )
        self._stack.close()

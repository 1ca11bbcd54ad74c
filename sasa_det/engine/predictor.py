"""A trained detector that finds objects in images."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.structures import Instances
from PIL import Image

from ..data.images import read_image
from ..data.mapper import model_input
from ..data.tiling import Tile, tile_image
from ..errors import UsageError
from ..modeling import fuse, with_augmentation
from ..modeling.inference import infer_in_batches
from .tasks import task_of
from .tiles import merge_tiles
from .trained_model import TrainedModel, load_trained_model


class Predictor:
    """Finds objects in images with a trained detector; detectron2's DefaultPredictor for batches.

    ::

        predictor = Predictor.from_checkpoint("output/model_final.pth", score_threshold=0.5)
        for instances in predictor(["street.jpg", cv2.imread("square.png")]):
            print(instances.pred_boxes, instances.scores, instances.pred_classes)

    Images are resized as in evaluation. Those that have the same size after resizing go through the
    model together, and an image has the same boxes in every batch. ``TEST.AUG.ENABLED`` in the
    config of the model asks for test-time augmentation.

    Attributes:
        trained (TrainedModel): the model as it was loaded, with the names of its classes.
        max_pixels (int): largest product of height and width of an image that is read.
    """

    def __init__(
        self,
        trained: TrainedModel,
        *,
        score_threshold: float | None = None,
        batch_size: int = 8,
        tile: int = 0,
        overlap: float = 0.2,
    ):
        """
        Args:
            trained: the model; its thresholds are changed in a copy.
            score_threshold: lowest score of an object, in [0, 1]; by default, the one of the
                model's config, such as ``MODEL.RETINANET.SCORE_THRESH_TEST``.
            batch_size: how many images or tiles go through the model at once, at most.
            tile: height and width of the tiles, in pixels, that images are cut into; 0 for whole
                images. A tile is resized as an image is.
            overlap: share of a tile that the next one shows as well, in [0, 1). Objects must be
                smaller than that to be whole in a tile.

        Raises:
            ValueError: naming the argument that is out of its range.
            UsageError: if the mapper of a LazyConfig is not of the kind of detectron2's.
        """
        if score_threshold is not None and not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold must be within [0, 1], got {score_threshold}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if tile < 0:
            raise ValueError(f"tile must be at least 1, or 0 for whole images, got {tile}")
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
        options = trained.options
        self.trained, self.max_pixels = trained, options.max_pixels
        self._batch_size, self._tile, self._overlap = batch_size, tile, overlap
        mapper = task_of(options).test_mapper()
        try:
            self._augmentations, self._format = mapper.augmentations, mapper.image_format
        except AttributeError as error:
            raise UsageError(
                "dataloader.test.mapper must have augmentations and an image_format, as a "
                f"DatasetMapper of detectron2 has, got a {type(mapper).__name__}."
            ) from error
        self._model = fuse(trained.model)
        thresholds = {}
        for name in ("test_score_thresh", "test_nms_thresh"):
            modules = [module for module in self._model.modules() if hasattr(module, name)]
            if not modules:
                raise UsageError(
                    f"a {options.meta_architecture} has no {name}: prediction needs a detector "
                    "such as RetinaNet or GeneralizedRCNN."
                )
            thresholds[name] = modules
        if score_threshold is not None:
            for module in thresholds["test_score_thresh"]:
                module.test_score_thresh = score_threshold
        # The stages of a cascade have the same one.
        self._nms_threshold = thresholds["test_nms_thresh"][-1].test_nms_thresh
        self._augmented = None
        if options.tta_enabled:
            self._augmented = with_augmentation(trained.config, self._model)

    @classmethod
    def from_checkpoint(
        cls,
        weights: str | os.PathLike,
        *,
        config_file: str = "",
        opts: Sequence[str] = (),
        **options: object,
    ) -> "Predictor":
        """Load a checkpoint that carries its config, as those of a training here do.

        Args:
            weights, config_file, opts: as of
                :func:`sasa_det.engine.trained_model.load_trained_model`.
            **options: as of :class:`Predictor`.

        Raises:
            UsageError, CheckpointError: in one sentence that names the file or the key.
        """
        return cls(load_trained_model(weights, config_file=config_file, opts=opts), **options)

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray | str | os.PathLike]) -> list[Instances]:
        """Find the objects in images.

        Args:
            images: (H, W, 3) uint8 arrays in the order BGR, as OpenCV reads them and detectron2's
                DefaultPredictor takes them, or paths of image files, which are read as in training.

        Returns:
            list[Instances]: of each image, in its pixels: "pred_boxes", "scores", "pred_classes"
            and, of R-CNNs with them, "pred_masks" and "pred_keypoints", in the order of the scores,
            on the device of the model.

        Raises:
            ValueError: if an array is not such an image.
            ImageError: if a file cannot be read.
        """
        if isinstance(images, (str, os.PathLike)):
            raise ValueError(f"images must be a list of images, got the path {images}")
        if isinstance(images, np.ndarray) and images.ndim < 4:
            raise ValueError(f"images must be a list of images, got an array of {images.shape}")
        arrays = [
            read_image(os.fspath(image), self.max_pixels, "BGR")
            if isinstance(image, (str, os.PathLike))
            else image
            for image in images
        ]
        for array in arrays:
            _check_image(array)
        if not self._tile:
            return self._detect(arrays)
        tiles = [tile_image(*array.shape[:2], self._tile, self._overlap) for array in arrays]
        return [self._in_tiles(array, cut) for array, cut in zip(arrays, tiles, strict=True)]

    def _in_tiles(self, image: np.ndarray, tiles: Sequence[Tile]) -> Instances:
        results: list[Instances] = []
        # Not all of a large image at once.
        for start in range(0, len(tiles), self._batch_size):
            part = tiles[start : start + self._batch_size]
            results += self._detect([image[t.y0 : t.y1, t.x0 : t.x1] for t in part])
        if len(tiles) == 1:
            return results[0]
        return merge_tiles(results, tiles, image.shape[:2], self._nms_threshold)

    def _detect(self, images: Sequence[np.ndarray]) -> list[Instances]:
        images = [_converted(image, self._format) for image in images]
        if self._augmented is not None:
            inputs = [model_input(image, lambda _: None) for image in images]
            outputs = self._augmented(inputs)
        else:
            inputs = [model_input(image, self._augmentations) for image in images]
            outputs = infer_in_batches(self._model, inputs, self._batch_size)
        return [output["instances"] for output in outputs]


def _check_image(image: object) -> None:
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"an image must be a NumPy array or the path of a file, got a {type(image).__name__}"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(
            "an image must be an array of shape (H, W, 3) and type uint8 in the order BGR, got "
            f"{image.shape} and {image.dtype}"
        )


def _converted(image: np.ndarray, image_format: str) -> np.ndarray:
    """Convert an image from BGR as a file is converted to ``INPUT.FORMAT``."""
    if image_format == "BGR":
        return image
    rgb = image[:, :, ::-1]
    if image_format == "RGB":
        return rgb
    return detection_utils.convert_PIL_to_numpy(Image.fromarray(rgb), image_format)

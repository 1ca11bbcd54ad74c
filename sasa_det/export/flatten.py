"""Models with tensors in and tensors out, as every format of a file wants them.

detectron2's ``TracingAdapter`` does that for R-CNNs. What RetinaNet does behind its head it decides
by the numbers of boxes found, which no program of ``torch.export`` can follow: here the same steps
are written for sizes that are not known.
"""

import torch
import torch.nn.functional as F
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torch import Tensor, nn
from torchvision.ops import nms

from ..errors import UsageError
from ..modeling import Classifier


def padded_image(model: nn.Module, image: Tensor) -> Tensor:
    """Normalize an image (C, H, W) in 0 to 255 and pad it as a detector does: (1, C, H', W')."""
    stride = max(model.backbone.size_divisibility, 1)
    height, width = image.shape[1], image.shape[2]
    bottom = (height + stride - 1) // stride * stride - height
    right = (width + stride - 1) // stride * stride - width
    image = (image.to(model.pixel_mean.dtype) - model.pixel_mean) / model.pixel_std
    return F.pad(image, (0, right, 0, bottom))[None]


class FlatRetinaNet(nn.Module):
    """A RetinaNet from an image to boxes, scores and classes."""

    kind = "detector"
    output_names = ("boxes", "scores", "classes")

    def __init__(self, model: RetinaNet):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            image: (C, H, W) in 0 to 255, in the order of the channels of ``INPUT.FORMAT``.

        Returns:
            (boxes, scores, classes): (M, 4) in pixels of the image, (M,) and (M,) int64, in the
            order of the scores.
        """
        model = self.model
        features = model.backbone(padded_image(model, image))
        features = [features[name] for name in model.head_in_features]
        logits, deltas = model.head(features)
        anchors = [
            _anchors(feature, *of_level)
            for feature, *of_level in zip(features, *_anchor_options(model), strict=True)
        ]
        levels = [self._candidates(*level) for level in zip(anchors, logits, deltas, strict=True)]
        boxes, scores, classes = (torch.cat(parts) for parts in zip(*levels, strict=True))
        likely = torch.nonzero(scores > model.test_score_thresh).squeeze(1)
        boxes, scores, classes = boxes[likely], scores[likely], classes[likely]
        kept = _nms_by_class(boxes, scores, classes, model.test_nms_thresh)
        kept = kept[: model.max_detections_per_image]
        return _inside(boxes[kept], scores[kept], classes[kept], image)

    def _candidates(self, anchors: Tensor, logits: Tensor, deltas: Tensor):
        """Decode the boxes of the best scores of a level; those below the threshold are among them.

        As ``RetinaNet._decode_per_level_predictions``, which applies the threshold first.
        """
        model = self.model
        scores = permute_to_N_HWA_K(logits, model.num_classes)[0].sigmoid().flatten()
        deltas = permute_to_N_HWA_K(deltas, 4)[0]
        scores, index = scores.topk(_at_most(scores.shape[0], model.test_topk_candidates))
        place = index // model.num_classes
        boxes = model.box2box_transform.apply_deltas(deltas[place], anchors[place])
        return boxes, scores, index % model.num_classes


def _anchor_options(model: RetinaNet):
    generator = model.anchor_generator
    return generator.cell_anchors, generator.strides, [generator.offset] * len(generator.strides)


def _anchors(feature: Tensor, cell: Tensor, stride: int, offset: float) -> Tensor:
    """As detectron2's ``DefaultAnchorGenerator`` of one level, which counts in steps of floats."""
    y, x = (
        (torch.arange(size, device=cell.device).to(cell.dtype) + offset) * stride
        for size in (feature.shape[2], feature.shape[3])
    )
    height, width = feature.shape[2], feature.shape[3]
    y, x = y[:, None].expand(height, width), x[None].expand(height, width)
    shifts = torch.stack([x, y, x, y], 2).reshape(-1, 1, 4)
    return (shifts + cell[None]).reshape(-1, 4)


def _at_most(size, limit: int):
    # In a trace sizes are tensors, and Python's min() would decide on one of them.
    if isinstance(size, Tensor):
        return size.clamp(max=limit)
    return torch.sym_min(size, limit)


def _nms_by_class(boxes: Tensor, scores: Tensor, classes: Tensor, threshold: float) -> Tensor:
    """Return the indices that non-maximum suppression keeps, in the order of the scores.

    Every class is moved to a place of its own, so that classes do not suppress each other.
    """
    edges = torch.cat([boxes.flatten(), boxes.new_zeros(1)])  # not empty where there are no boxes
    offset = classes.to(boxes.dtype) * (edges.max() - edges.min() + 1)
    return nms(boxes + offset[:, None], scores, threshold)


def _inside(boxes: Tensor, scores: Tensor, classes: Tensor, image: Tensor):
    """Cut boxes off at the border of an image, and leave out those of which nothing remains."""
    height, width = image.shape[1], image.shape[2]
    x0, y0, x1, y1 = boxes.unbind(1)
    x0, x1 = x0.clamp(0, width), x1.clamp(0, width)
    y0, y1 = y0.clamp(0, height), y1.clamp(0, height)
    kept = torch.nonzero((x1 > x0) & (y1 > y0)).squeeze(1)
    return torch.stack([x0, y0, x1, y1], 1)[kept], scores[kept], classes[kept]


class RawRetinaNet(nn.Module):
    """A RetinaNet from an image to features, logits and deltas of every level."""

    kind = "raw"

    def __init__(self, model: RetinaNet):
        super().__init__()
        self.model = model
        names = model.head_in_features
        self.output_names = tuple(
            f"{what}_{name}" for what in ("features", "logits", "deltas") for name in names
        )

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            image: as of :class:`FlatRetinaNet`.

        Returns:
            tuple[Tensor]: named by ``output_names``: (1, C, H, W), (1, A K, H, W), (1, A 4, H, W).
        """
        features = self.model.backbone(padded_image(self.model, image))
        features = [features[name] for name in self.model.head_in_features]
        logits, deltas = self.model.head(features)
        return (*features, *logits, *deltas)


class FlatClassifier(nn.Module):
    """A classifier from an image to the probabilities of the classes, or to what leads to them."""

    def __init__(self, model: Classifier, raw: bool = False):
        super().__init__()
        self.model = model
        self.kind = "raw" if raw else "classifier"
        self._features = list(model.backbone.output_shape()) if raw else []
        names = [f"features_{name}" for name in self._features]
        self.output_names = (*names, "logits") if raw else ("scores",)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            image: (C, H, W) in 0 to 255.

        Returns:
            (scores,): (num_classes,); raw, the features and the logits.
        """
        model = self.model
        if self.kind == "classifier":
            return (model.logits(image[None]).softmax(1)[0],)
        features = model.backbone(((image - model.pixel_mean) / model.pixel_std)[None])
        logits = features[model.in_feature]
        if model.linear is not None:
            logits = model.linear(logits.mean((2, 3)))
        return (*(features[name] for name in self._features), logits)


def _flat_rcnn(model: GeneralizedRCNN, image: Tensor) -> TracingAdapter:
    """Return what detectron2 traces of an R-CNN; it runs its own steps behind the heads."""
    has_masks = bool(getattr(model.roi_heads, "mask_on", False))

    def infer(model: GeneralizedRCNN, image: Tensor) -> tuple[Tensor, ...]:
        found = model.inference([{"image": image}], do_postprocess=False)[0]
        masks = (found.pred_masks,) if has_masks else ()
        return (found.pred_boxes.tensor, found.scores, found.pred_classes, *masks)

    adapter = TracingAdapter(model, image, infer)
    adapter.kind = "detector"
    adapter.output_names = ("boxes", "scores", "classes") + (("masks",) if has_masks else ())
    return adapter


def flatten_model(model: nn.Module, image: Tensor, *, raw: bool = False) -> nn.Module:
    """Return a model with one image as its input and a tuple of tensors as its output.

    Args:
        model: RetinaNet, classifier or R-CNN, in eval mode.
        image: (C, H, W) in 0 to 255, a sample.
        raw: whether the outputs are features, logits and deltas, not what is made of them.

    Returns:
        nn.Module: with the attributes ``kind``, one of "detector", "classifier" and "raw", and
        ``output_names``.

    Raises:
        UsageError: if there is no such form of the model.
    """
    if isinstance(model, RetinaNet):
        return RawRetinaNet(model) if raw else FlatRetinaNet(model)
    if isinstance(model, Classifier):
        return FlatClassifier(model, raw)
    if type(model) is GeneralizedRCNN and not raw:
        if getattr(model.roi_heads, "keypoint_on", False):
            raise UsageError("an R-CNN with MODEL.KEYPOINT_ON True cannot be exported.")
        return _flat_rcnn(model, image)
    what = "with --raw" if type(model) is GeneralizedRCNN else "by this command"
    raise UsageError(
        f"a {type(model).__name__} cannot be exported {what}; RetinaNet, AttentionRetinaNet and "
        "Classifier can, and GeneralizedRCNN without --raw."
    )

"""Image classification over any backbone, as backbones are pretrained on ImageNet."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from torch import Tensor, nn

from ..config.defaults import check_has_keys


@META_ARCH_REGISTRY.register()
class Classifier(nn.Module):
    """A backbone and a linear classifier (appendix A.2).

    A backbone that gives the feature ``linear`` brings its classifier; over any other, its
    coarsest feature is averaged and goes through a linear layer.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        label_smoothing: float = 0.0,
    ):
        """
        Args:
            backbone: gives one feature or more.
            num_classes: classes to tell apart.
            pixel_mean, pixel_std: by channel, in units of 0 to 255.
            label_smoothing: share of a label that is spread evenly over all classes, in [0, 1).

        Raises:
            ValueError: if the backbone's classifier has another number of classes.
        """
        super().__init__()
        self.backbone = backbone
        features = backbone.output_shape()
        self.linear = None
        if "linear" in features:
            self.in_feature = "linear"
            if features["linear"].channels != num_classes:
                raise ValueError(
                    "the backbone's classifier must have num_classes (MODEL.CLASSIFIER.NUM_CLASSES)"
                    f" {num_classes} classes, it has {features['linear'].channels}."
                )
        else:
            self.in_feature = max(features, key=lambda name: features[name].stride)
            self.linear = nn.Linear(features[self.in_feature].channels, num_classes)
            # As detectron2's ResNet starts its own.
            nn.init.normal_(self.linear.weight, std=0.01)
            nn.init.zeros_(self.linear.bias)
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        self.register_load_state_dict_pre_hook(_accept_names_of_checkpoints)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        check_has_keys(cfg)
        return {
            "backbone": build_backbone(cfg),
            "num_classes": cfg.MODEL.CLASSIFIER.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "label_smoothing": cfg.MODEL.CLASSIFIER.LABEL_SMOOTHING,
        }

    @property
    def head(self) -> nn.Linear:
        """The linear layer that gives the logits."""
        return self.backbone.linear if self.linear is None else self.linear

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(
        self, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """
        Args:
            batch: a dict of the batch, or a list of one dict an image, of images of one size:
                "image", (N, C, H, W) or (C, H, W) in 0 to 255, and, in training, "label", the
                number of the class.

        Returns:
            dict or list: in training the loss, "loss_cls"; else for each image a dict of
            "scores", the (num_classes,) probabilities.
        """
        images = self._gather(batch, "image")
        if not len(images):  # as where no image of a batch could be read
            return []
        logits = self.logits(images)
        if self.training:
            labels = self._gather(batch, "label")
            loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
            return {"loss_cls": loss}
        return [{"scores": scores} for scores in logits.float().softmax(dim=1)]

    def logits(self, images: Tensor) -> Tensor:
        """Return the (N, num_classes) logits of (N, C, H, W) images in 0 to 255."""
        features = self.backbone((images - self.pixel_mean) / self.pixel_std)
        feature = features[self.in_feature]
        return feature if self.linear is None else self.linear(feature.mean(dim=(2, 3)))

    def _gather(self, batch: Mapping | Sequence[Mapping], key: str) -> Tensor:
        if isinstance(batch, Mapping):
            values = batch[key]
        else:
            values = torch.stack([torch.as_tensor(sample[key]) for sample in batch])
        return values.to(self.device, non_blocking=True)


def _accept_names_of_checkpoints(
    module: Classifier, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Give weights of the backbone their names where a checkpoint leaves ``backbone.`` out."""
    for name in module.backbone.state_dict():
        short, full = f"{prefix}{name}", f"{prefix}backbone.{name}"
        if short in state_dict and full not in state_dict:
            state_dict[full] = state_dict.pop(short)

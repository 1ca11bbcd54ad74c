"""The tables of "Stand-Alone Self-Attention in Vision Models" beside what this code counts.

Tables 1 and 3 to 7 are ResNets on 224 x 224 images with 1000 classes, Table 2 RetinaNets on
640 x 640 images with 6 anchors a location and 90 classes, which is what the printed FLOPs and
parameters of the convolutional baseline stand for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from detectron2.config import get_cfg

from ..config import add_sasa_config
from .backbone.sasa_resnet import STAGES, SASAResNet
from .complexity import Part, count_config, count_resnet, total

__all__ = ["PAPER_TABLES", "Row"]


@dataclass(frozen=True)
class Row:
    """One row of a table of the paper.

    Attributes:
        name: what the row is about.
        flops: printed FLOPs in 10^9, None where the paper prints none.
        parameters: printed parameters in 10^6, None where the paper prints none.
        accuracy: printed top-1 accuracy or COCO mAP in percent.
        count: counts the same model here.
    """

    name: str
    flops: float | None
    parameters: float | None
    accuracy: float | None
    count: Callable[[], Part]


def _resnet(**options: Any) -> Callable[[], Part]:
    options = {"stem": "convolution", "num_classes": 1000, **options}
    return lambda: total(count_resnet(SASAResNet(**options), 224, 224))


def _baseline(depth: int = 50) -> Callable[[], Part]:
    return _resnet(depth=depth, attention_stages=())


def _attention(**attention: Any) -> Callable[[], Part]:
    return _resnet(attention=attention)


def _full(**stem_options: Any) -> Callable[[], Part]:
    return _resnet(stem="attention", stem_options=stem_options)


def _stages(*groups: int) -> Callable[[], Part]:
    return _resnet(attention_stages=[STAGES[group - 1] for group in groups])


def _retinanet(num_anchors: int = 6, num_classes: int = 90, **sasa: Any) -> Part:
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "AttentionRetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_sasa_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    sizes = [float(i + 1) for i in range(num_anchors // 3)]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [sizes] * 5
    cfg.MODEL.SASA.update(sasa)
    return total(count_config(cfg, 640, 640))


def _table_2() -> list[Row]:
    convolution: dict[str, Any] = {"FPN": "convolution", "HEAD": "convolution"}
    stem = {"STEM": "convolution"}
    rows = [
        (
            "conv heads + FPN, ResNet-50",
            182,
            33.4,
            36.5,
            {**convolution, **stem, "ATTENTION_STAGES": []},
        ),
        ("conv heads + FPN, conv stem + attention", 173, 25.9, 36.8, {**convolution, **stem}),
        ("conv heads + FPN, full attention", 173, 25.9, 36.2, convolution),
        ("attention heads + FPN, conv stem + attention", 111, 22.0, 36.6, stem),
        ("attention heads + FPN, full attention", 110, 22.0, 36.6, {}),
        (
            "  the same with a mixing layer, conv stem",
            111,
            22.0,
            36.6,
            {**stem, "HEAD_MIXING_LAYER": True},
        ),
        ("  the same with a mixing layer, full", 110, 22.0, 36.6, {"HEAD_MIXING_LAYER": True}),
    ]
    return [
        Row(name, flops, parameters, accuracy, partial(_retinanet, **sasa))
        for name, flops, parameters, accuracy, sasa in rows
    ]


PAPER_TABLES: dict[str, list[Row]] = {
    "Table 1: ImageNet, by depth": [
        Row("ResNet-26 baseline", 4.7, 13.7, 74.5, _baseline(26)),
        Row("ResNet-26 conv stem + attention", 4.5, 10.3, 75.8, _resnet(depth=26)),
        Row("ResNet-26 full attention", 4.7, 10.3, 74.8, _resnet(depth=26, stem="attention")),
        Row("ResNet-38 baseline", 6.5, 19.6, 76.2, _baseline(38)),
        Row("ResNet-38 conv stem + attention", 5.7, 14.1, 77.1, _resnet(depth=38)),
        Row("ResNet-38 full attention", 6.0, 14.1, 76.9, _resnet(depth=38, stem="attention")),
        Row("ResNet-50 baseline", 8.2, 25.6, 76.9, _baseline()),
        Row("ResNet-50 conv stem + attention", 7.0, 18.0, 77.4, _resnet()),
        Row("ResNet-50 full attention", 7.2, 18.0, 77.6, _full()),
    ],
    "Table 2: COCO, RetinaNet at 640 x 640, 6 anchors, 90 classes": _table_2(),
    "Table 3: attention by stage group": [
        Row("groups 1, 2, 3, 4", 7.0, 18.0, 80.2, _stages(1, 2, 3, 4)),
        Row("groups 2, 3, 4", 7.3, 18.1, 80.7, _stages(2, 3, 4)),
        Row("groups 3, 4", 7.5, 18.5, 80.7, _stages(3, 4)),
        Row("group 4", 8.0, 20.8, 80.2, _stages(4)),
        Row("none", 8.2, 25.6, 79.5, _stages()),
        Row("group 1", 7.9, 25.5, 79.7, _stages(1)),
        Row("groups 1, 2", 7.8, 25.0, 79.6, _stages(1, 2)),
        Row("groups 1, 2, 3", 7.2, 22.7, 79.9, _stages(1, 2, 3)),
    ],
    "Table 4: spatial extent k": [
        Row(f"{k} x {k}", flops, None, accuracy, _attention(kernel_size=k))
        for k, flops, accuracy in (
            (3, 6.6, 76.4),
            (5, 6.7, 77.2),
            (7, 7.0, 77.4),
            (9, 7.3, 77.7),
            (11, 7.7, 77.6),
        )
    ],
    "Table 6: content and position": [
        Row("q.r", 6.1, 16.7, 76.9, _attention(content=False)),
        Row("q.k + q.r", 7.0, 18.0, 77.4, _attention()),
    ],
    "Table 7: values of the attention stem": [
        Row("stand-alone", 7.1, None, 76.2, _full(values="pointwise")),
        Row("spatial convolution for values", 7.4, None, 77.2, _full(values="convolution")),
        Row("spatially aware values", 7.2, None, 77.6, _full(values="mixture")),
    ],
}

"""What "Stand-Alone Self-Attention in Vision Models" prints, and the configs of its models.

Tables 1 and 3 to 7 and Figure 5 are ResNets on 224 x 224 images with 1000 classes, Table 2
RetinaNets on 640 x 640 images with 6 anchors a location and 90 classes, which is what the printed
FLOPs and parameters of the convolutional baseline stand for. Figure 5 prints no numbers and does
not say how wide its models are: the widths here are a choice.
"""

from dataclasses import dataclass

# Folder of the configs of all tables but Table 2.
ABLATIONS = "Ablations"

# The models of Table 1 and Figure 5, by what the names of their configs call them.
SERIES = {
    "baseline": "baseline",
    "convstem": "conv stem + attention",
    "full": "full attention",
}


@dataclass(frozen=True)
class Row:
    """One model of a table of the paper.

    Attributes:
        name: what the row is about.
        config: its config in the table's folder, without the suffix.
        flops: printed FLOPs in 10^9, None where the paper prints none.
        parameters: printed parameters in 10^6, None where the paper prints none.
        accuracy: printed top-1 accuracy or COCO mAP in percent, None where the paper prints none.
        series: the kind of model, of the values of :data:`SERIES`, in Table 1 and Figure 5.
        opts: KEY VALUE pairs that the row's model needs beside its config.
    """

    name: str
    config: str
    flops: float | None
    parameters: float | None
    accuracy: float | None
    series: str = ""
    opts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        title: what it varies.
        rows: its models.
        metric: what its accuracies are.
        folder: of its configs, in the folder of all configs.
        size: height and width of the image that is counted, in pixels.
    """

    title: str
    rows: tuple[Row, ...]
    metric: str = "top-1"
    folder: str = ABLATIONS
    size: int = 224


def _by_depth(depth: int, *printed: tuple[float, float, float]) -> list[Row]:
    return [
        Row(f"ResNet-{depth}", f"table1_R{depth}_{key}", *numbers, series=series)
        for (key, series), numbers in zip(SERIES.items(), printed, strict=True)
    ]


def _by_width(key: str, series: str) -> list[Row]:
    return [
        Row(f"width {width:g}", f"figure5_{key}_width_{width:.2f}", None, None, None, series)
        for width in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    ]


def _retinanet(
    name: str, attention: str, printed: tuple[float, float, float], mixing: bool = False
) -> Row:
    opts = (
        *("MODEL.RETINANET.NUM_CLASSES", "90"),
        *("MODEL.ANCHOR_GENERATOR.SIZES", "[[32.0, 45.0]]"),  # of 3 aspect ratios each
        *("MODEL.FPN.NORM", "", "MODEL.RETINANET.NORM", ""),
        *("MODEL.SASA.HEAD_MIXING_LAYER", str(mixing)),
    )
    config = f"retinanet_SASA_R_50_{attention}" if attention else "retinanet_R_50"
    return Row(name, config, *printed, opts=opts)


# Tables 3 and 5 hold out a part of the training images (appendix A.2).
_HELD_OUT = "held-out top-1"

PAPER_TABLES = {
    "Table 1": Table(
        "ImageNet, by depth",
        (
            *_by_depth(26, (4.7, 13.7, 74.5), (4.5, 10.3, 75.8), (4.7, 10.3, 74.8)),
            *_by_depth(38, (6.5, 19.6, 76.2), (5.7, 14.1, 77.1), (6.0, 14.1, 76.9)),
            *_by_depth(50, (8.2, 25.6, 76.9), (7.0, 18.0, 77.4), (7.2, 18.0, 77.6)),
        ),
    ),
    "Table 2": Table(
        "COCO, RetinaNet at 640 x 640, 6 anchors, 90 classes",
        (
            _retinanet("conv heads + FPN, ResNet-50", "", (182, 33.4, 36.5)),
            _retinanet(
                "conv heads + FPN, conv stem + attention", "convstem_backbone", (173, 25.9, 36.8)
            ),
            _retinanet("conv heads + FPN, full attention", "backbone", (173, 25.9, 36.2)),
            _retinanet(
                "attention heads + FPN, conv stem + attention", "convstem_full", (111, 22.0, 36.6)
            ),
            _retinanet("attention heads + FPN, full attention", "full", (110, 22.0, 36.6)),
            _retinanet(
                "the same with a mixing layer, conv stem", "convstem_full", (111, 22.0, 36.6), True
            ),
            _retinanet("the same with a mixing layer, full", "full", (110, 22.0, 36.6), True),
        ),
        metric="mAP",
        folder="COCO-Detection",
        size=640,
    ),
    "Table 3": Table(
        "attention by stage group",
        (
            Row("groups 1, 2, 3, 4", "table3_groups_1_2_3_4", 7.0, 18.0, 80.2),
            Row("groups 2, 3, 4", "table3_groups_2_3_4", 7.3, 18.1, 80.7),
            Row("groups 3, 4", "table3_groups_3_4", 7.5, 18.5, 80.7),
            Row("group 4", "table3_groups_4", 8.0, 20.8, 80.2),
            Row("none", "table3_groups_none", 8.2, 25.6, 79.5),
            Row("group 1", "table3_groups_1", 7.9, 25.5, 79.7),
            Row("groups 1, 2", "table3_groups_1_2", 7.8, 25.0, 79.6),
            Row("groups 1, 2, 3", "table3_groups_1_2_3", 7.2, 22.7, 79.9),
        ),
        metric=_HELD_OUT,
    ),
    "Table 4": Table(
        "spatial extent k",
        (
            Row("3 x 3", "table4_k3", 6.6, None, 76.4),
            Row("5 x 5", "table4_k5", 6.7, None, 77.2),
            Row("7 x 7", "table4_k7", 7.0, None, 77.4),
            Row("9 x 9", "table4_k9", 7.3, None, 77.7),
            Row("11 x 11", "table4_k11", 7.7, None, 77.6),
        ),
    ),
    "Table 5": Table(
        "position",
        (
            Row("none", "table5_none", 6.9, 18.0, 77.6),
            Row("absolute", "table5_absolute", 6.9, 18.0, 78.2),
            Row("relative", "table5_relative", 7.0, 18.0, 80.2),
        ),
        metric=_HELD_OUT,
    ),
    "Table 6": Table(
        "content and position",
        (
            Row("q.r", "table6_qr", 6.1, 16.7, 76.9),
            Row("q.k + q.r", "table6_qk_qr", 7.0, 18.0, 77.4),
        ),
    ),
    "Table 7": Table(
        "values of the attention stem",
        (
            Row("stand-alone", "table7_stand_alone", 7.1, None, 76.2),
            Row("spatial convolution for values", "table7_spatial_convolution", 7.4, None, 77.2),
            Row("spatially aware values", "table7_spatially_aware", 7.2, None, 77.6),
        ),
    ),
    "Figure 5": Table(
        "ResNet-50, by width",
        tuple(row for key, series in SERIES.items() for row in _by_width(key, series)),
    ),
}

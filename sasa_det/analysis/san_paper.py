"""What "Exploring Self-attention for Image Recognition" prints about its models, and its counting.

The operations that the paper prints are those of the counter in its official repository, in 10^9 of
one image of 224 x 224 pixels. The unit is a multiply-add, but more than multiply-adds are counted:

- 1 for every multiply-add of a convolution or linear layer, and for every bias of a convolution;
- 1 for every multiply-add of the aggregation, the weighted sum of values;
- 1 for every difference of a query and a key, and of two positions;
- 2 for every value that goes through a batch norm, 1 for every value through a ReLU;
- 1 for every value that goes into a max pool or into the global average.

Softmax, the sums of the residual branches and the bias of the last linear layer are free. Counted
like this, all nine models come to the printed number in each of its digits. Multiply-adds alone, as
:func:`sasa_det.analysis.complexity.count_config` counts them, are 4 to 6% less for a SAN.
"""

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import torch

from ..config.load import load_config
from .complexity import Part, count_config, markdown, total
from .paper_tables import Row, Table

Shape = Sequence[int]

SAN_TABLE = Table(
    "ImageNet, self-attention networks and residual networks",
    (
        Row("ResNet-26", "Ablations/table1_R26_baseline", 2.4, 13.7, 73.6),
        Row("SAN10, pairwise", "ImageNet/SAN10_pairwise", 2.2, 10.5, 74.9),
        Row("SAN10, patchwise", "ImageNet/SAN10_patchwise", 1.9, 11.8, 77.1),
        Row("ResNet-38", "Ablations/table1_R38_baseline", 3.2, 19.6, 76.0),
        Row("SAN15, pairwise", "ImageNet/SAN15_pairwise", 3.0, 14.1, 76.6),
        Row("SAN15, patchwise", "ImageNet/SAN15_patchwise", 2.6, 16.2, 78.0),
        Row("ResNet-50", "Ablations/table1_R50_baseline", 4.1, 25.6, 76.9),
        Row("SAN19, pairwise", "ImageNet/SAN19_pairwise", 3.8, 17.6, 76.9),
        Row("SAN19, patchwise", "ImageNet/SAN19_patchwise", 3.3, 20.5, 78.2),
    ),
    folder="",
)


# The paper's ablation of relations. The accuracies are those of its SAN10s on ImageNet.
SAN_RELATIONS = Table(
    "relations of self-attention",
    (
        Row("pairwise, subtraction", "san_pairwise_subtraction", None, None, 74.9),
        Row("pairwise, summation", "san_pairwise_summation", None, None, None),
        Row("pairwise, concatenation", "san_pairwise_concatenation", None, None, None),
        Row("pairwise, Hadamard product", "san_pairwise_hadamard_product", None, None, None),
        Row("pairwise, dot product", "san_pairwise_dot_product", None, None, None),
        Row("patchwise, concatenation", "san_patchwise_concatenation", None, None, 77.1),
        Row("patchwise, star product", "san_patchwise_star_product", None, None, None),
        Row("patchwise, clique product", "san_patchwise_clique_product", None, None, None),
    ),
)


def _convolution(x: Shape, weight: Shape, bias: Shape | None, *_, out_shape: Shape, **__) -> int:
    multiply_adds = prod(out_shape) * prod(weight[1:])
    return multiply_adds + (0 if bias is None else prod(out_shape))


def _linear(bias: Shape, x: Shape, weight: Shape, *_, **__) -> int:
    return prod(x) * weight[1]


def _aggregation(weight: Shape, value: Shape, kernel_size: int, *_, **__) -> int:
    return kernel_size**2 * prod(value)


def _of_each_result(*_, out_shape: Shape, **__) -> int:
    return prod(out_shape)


def _of_each_input(cost: int) -> Callable[..., int]:
    return lambda x, *_, **__: cost * prod(x)


# What an operator costs, from the shapes of its arguments.
_COSTS = {
    torch.ops.aten.convolution: _convolution,
    torch.ops.aten.addmm: _linear,
    torch.ops.sasa_det.vector_aggregation: _aggregation,
    torch.ops.aten.sub: _of_each_result,
    torch.ops.aten.native_batch_norm: _of_each_input(2),
    torch.ops.aten.relu: _of_each_input(1),
    torch.ops.aten.relu_: _of_each_input(1),
    torch.ops.aten.max_pool2d_with_indices: _of_each_input(1),
    torch.ops.aten.mean: _of_each_input(1),
}


def count_san_row(configs: Path, row: Row) -> Part:
    """Count a model of :data:`SAN_TABLE` as the paper does.

    Args:
        configs: the folder of all configs.
        row: of the table.

    Returns:
        Part: the whole model, whose ``flops`` are the operations that the paper counts.
    """
    cfg = load_config(str(configs / f"{row.config}.yaml"))
    return total(count_config(cfg, SAN_TABLE.size, SAN_TABLE.size, costs=_COSTS))


def san_paper_report(configs: Path) -> str:
    """Tabulate what the paper prints beside what this code counts.

    Args:
        configs: the folder of all configs.

    Returns:
        str: a table in Markdown.
    """
    rows = []
    for row in SAN_TABLE.rows:
        count = count_san_row(configs, row)
        operations = (row.flops, f"{count.flops / 1e9:.2f}")
        parameters = (row.parameters, f"{count.parameters:,}")
        rows.append((row.name, *operations, *parameters, row.accuracy))
    headers = ("model", "operations (G), paper", "counted", "params (M), paper", "counted")
    return (
        f"Exploring Self-attention for Image Recognition: {SAN_TABLE.title}\n\n"
        f"{markdown(rows, (*headers, f'{SAN_TABLE.metric}, paper'))}"
    )

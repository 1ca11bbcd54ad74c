"""The attention operators as standard operators, beside the operators."""

import pytest
import torch

from sasa_det.export import DECOMPOSITIONS, Decompose
from sasa_det.export.decompositions import SHORT_DECOMPOSITIONS
from sasa_det.layers import (
    AttentionStem,
    LocalSelfAttention2d,
    PairwiseAttention2d,
    PatchwiseAttention2d,
)


class Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes which operators run, and the largest number of values that one of them returns."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.namespace)
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("size", [(9, 11), (2, 3), (1, 1)])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 7},
        {"kernel_size": 3, "border": "zero"},
        {"kernel_size": 3, "content": False},
        {"kernel_size": 5, "position": "none"},
        {"kernel_size": 5, "position": "none", "border": "zero"},
        {"kernel_size": 5, "position": "absolute", "stride": 2},
        {"kernel_size": 1},
    ],
)
@pytest.mark.parametrize("stand_ins", [DECOMPOSITIONS, SHORT_DECOMPOSITIONS])
def test_local_attention_is_that_of_the_reference(stand_ins, options, size):
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(8, 16, num_heads=2, backend="reference", **options).double()
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x)
        layer.backend = None
        with Decompose(stand_ins), Operators() as operators:
            found = layer(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert operators.names == {"aten"}


def test_no_window_is_unfolded():
    layer = LocalSelfAttention2d(32, 32, kernel_size=7, num_heads=2)
    x = torch.randn(1, 32, 40, 40)
    with torch.no_grad(), Decompose(), Operators() as operators:
        layer(x)
    # One head's logits of the 10 x 10 pixels that each tile of 4 x 4 reaches, where the windows of
    # all its channels would be 16 * 7 * 7 * 40 * 40 values.
    assert operators.largest == 10 * 10 * 40 * 40


@pytest.mark.parametrize("norm", [torch.nn.BatchNorm2d, None, lambda n: torch.nn.GroupNorm(2, n)])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("values", ["mixture", "pointwise", "convolution"])
@pytest.mark.parametrize(("block_size", "size"), [(4, (13, 18)), (4, (8, 8)), (3, (7, 3))])
def test_the_stem_is_that_of_its_operators(values, relative, norm, block_size, size):
    torch.manual_seed(0)
    options = {"values": values, "relative": relative, "norm": norm, "block_size": block_size}
    stem = AttentionStem(3, 16, 4, 4, **options).eval().requires_grad_(False)
    x = torch.randn(2, 3, *size)
    expected = stem(x)
    with Decompose(), Operators() as operators:
        found = stem(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert operators.names == {"aten"}


def test_the_table_has_every_operator_of_inference():
    names = {str(operator).split(".")[1] for operator in DECOMPOSITIONS}
    assert names == {
        "local_attention",
        "block_attention",
        "mixed_values",
        "stem_attention",
        "stem_attention_pooled",
        "vector_aggregation",
    }


@pytest.mark.parametrize("size", [(9, 11), (2, 3), (1, 1)])
@pytest.mark.parametrize("kind", [PairwiseAttention2d, PatchwiseAttention2d])
@pytest.mark.parametrize("stand_ins", [DECOMPOSITIONS, SHORT_DECOMPOSITIONS])
def test_vector_attention_is_that_of_the_operators(stand_ins, kind, size):
    torch.manual_seed(0)
    layer = kind(8, 16).double().eval()
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x)
        with Decompose(stand_ins), Operators() as operators:
            found = layer(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert operators.names == {"aten"}

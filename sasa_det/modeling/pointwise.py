"""1x1 convolutions that run as products of the C++ kernels."""

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn

from ..layers import (
    AttentionStem,
    LocalSelfAttention2d,
    PairwiseAttention2d,
    PatchwiseAttention2d,
)
from ..layers.norm import constant_affine, norm_kind
from ..layers.plain import is_plain_pointwise
from ..layers.projection import can_multiply, multiply
from ..ops.product import Operand, product

# These multiply with the weights of their projections themselves.
_MULTIPLY_THEMSELVES = (
    LocalSelfAttention2d,
    AttentionStem,
    PairwiseAttention2d,
    PatchwiseAttention2d,
)


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 ``nn.Conv2d`` that is a product where the kernels take its input."""

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, in_channels, H, W).

        Returns:
            (N, out_channels, ceil(H / stride), ceil(W / stride)).
        """
        if not torch.jit.is_scripting():
            if can_multiply(x, self):
                return multiply(take_strided(x, self.stride), self)
        options = (self.stride, self.padding, self.dilation, self.groups)
        return F.conv2d(x, self.weight, self.bias, *options)


class NormedPointwiseConv2d(Conv2d):
    """A 1x1 ``Conv2d`` of detectron2, with its norm and activation, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: (N, in_channels, H, W).

        Returns:
            (N, out_channels, ceil(H / stride), ceil(W / stride)).
        """
        normed = False
        options = (self.stride, self.padding, self.dilation, self.groups)
        if torch.jit.is_scripting():
            x = F.conv2d(x, self.weight, self.bias, *options)
        elif not can_multiply(x, self):
            x = F.conv2d(x, self.weight, self.bias, *options)
        elif torch.is_grad_enabled() or norm_kind(self.norm) not in ("nothing", "constant"):
            x = multiply(take_strided(x, self.stride), self)
        else:
            x, normed = convolve(Operand(take_strided(x, self.stride)), self), True
        if self.norm is not None and not normed:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


def is_product(layer: nn.Module) -> bool:
    """Tell whether a layer is a plain 1x1 convolution without stride, be it a product or not."""
    return is_plain_pointwise(layer) or is_plain_pointwise(layer, PointwiseConv2d)


def convolve(
    x: Operand, layer: Conv2d, residual: Tensor | None = None, relu: bool = False
) -> Tensor:
    """Run a 1x1 convolution and the norm behind it as one product, without gradients.

    Args:
        x: the input, at the places that the layer's stride leaves.
        layer: has a norm that does not depend on the batch, or none.
        residual: is added, a map of the output's shape.
        relu: whether a ReLU follows; the layer's own activation is left out.

    Returns:
        (N, out_channels, H, W).
    """
    affine, scale, shift = constant_affine(layer.norm), None, layer.bias
    if affine is not None:
        scale = affine.scale
        shift = affine.shift if shift is None else affine.shift + shift * scale
    return product(x, layer.weight, scale, shift, residual, relu)


def take_strided(x: Tensor, stride: tuple[int, int]) -> Tensor:
    """Return the pixels of (N, C, H, W) that a 1x1 convolution of a stride sees."""
    return x if stride == (1, 1) else x[:, :, :: stride[0], :: stride[1]].contiguous()


def use_products(module: nn.Module) -> nn.Module:
    """Let the 1x1 convolutions of a module run as products of the C++ kernels.

    That is for CPU tensors of float32, in training and inference. Parameters, names in the state
    dict and hooks stay; the class of a convolution becomes a subclass, which lookups by exact type,
    as of torch's quantization, do not find. The models of this project call it when they are built;
    it takes models of detectron2 and others as well.

    Args:
        module: convolutions in it with groups, padding or parametrizations and subclasses of
            ``nn.Conv2d`` other than detectron2's are left as they are, and so is a model with the
            backend "reference", which is PyTorch's operators throughout.

    Returns:
        nn.Module: the same module.
    """
    if not any(getattr(child, "is_reference", False) for child in module.modules()):
        _use_products(module)
    return module


def _use_products(module: nn.Module) -> None:
    for kind, pointwise in ((nn.Conv2d, PointwiseConv2d), (Conv2d, NormedPointwiseConv2d)):
        if is_plain_pointwise(module, kind, strided=True):
            module.__class__ = pointwise
    if not isinstance(module, _MULTIPLY_THEMSELVES):
        for child in module.children():
            _use_products(child)

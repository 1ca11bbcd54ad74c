"""What pairwise relations have in common: values made of two pixels' features."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairwiseForm:
    """The values of a relation, whose ReLU is what attention maps to weights.

    The first ``product_channels`` of them are each a sum of products own_i other_j over
    ``products / product_channels`` channels of own and other, the rest are sums own_i + other_j of
    a single channel.

    Attributes:
        kernel_size: extent of the windows.
        products: channels of own and other that are multiplied.
        product_channels: channels of the relation that they make.
    """

    kernel_size: int
    products: int = 0
    product_channels: int = 0

    @property
    def products_of_channel(self) -> int:
        """How many products are summed up."""
        return self.products // max(self.product_channels, 1)

    def normalize(
        self, own: Tensor, other: Tensor, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply a norm of the values to what they are made of.

        Args:
            own, other: (N, C, ...).
            scale, shift: of each of the relation's channels.

        Returns:
            (own, other, product_shift): the latter, (product_channels,), is added to the sums of
            products.
        """
        channels = self.product_channels
        product_scale = scale[:channels].repeat_interleave(self.products_of_channel)
        own_scale = torch.cat([product_scale, scale[channels:]])
        other_scale = torch.cat([torch.ones_like(product_scale), scale[channels:]])
        own_shift = torch.cat([torch.zeros_like(product_scale), shift[channels:]])
        own = torch.addcmul(own_shift[:, None, None], own_scale[:, None, None], own)
        return own, other_scale[:, None, None] * other, shift[:channels]

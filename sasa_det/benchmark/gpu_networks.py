"""RetinaNet-50 without losses and boxes, which wait for the GPU: what a CUDA graph can hold."""

from collections.abc import Callable

import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from ..ops.gpu_timing import Run
from .measure import Settings
from .models import twin_config


class Network(nn.Module):
    """Backbone, FPN and heads of a RetinaNet."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.backbone, self.head = model.backbone, model.head
        self.in_features = model.head_in_features

    def forward(self, images: Tensor) -> list[Tensor]:
        """
        Args:
            images: (N, 3, H, W), normalized.

        Returns:
            list[Tensor]: logits of all levels, and deltas of all levels.
        """
        features = self.backbone(images)
        logits, deltas = self.head([features[name] for name in self.in_features])
        return [*logits, *deltas]


def network_maker(
    settings: Settings, config: str, training: bool, autocast: bool = True
) -> Callable[[], Run]:
    """Return what makes a network, and its call.

    Args:
        settings: of the run.
        config: of a RetinaNet, in the settings' folder.
        training: forward and backward pass with gradients of all weights, or inference.
        autocast: whether weights and images are float32, and autocast casts them to the type of the
            settings; else they have that type themselves.
    """
    dtype = torch.float32 if autocast else settings.dtype

    def make() -> Run:
        network = Network(build_model(twin_config(settings, config)))
        network.to(dtype=dtype, memory_format=torch.channels_last)
        images = torch.randn(settings.batch, 3, settings.image_size, settings.image_size)
        images = images.to(settings.device, dtype, memory_format=torch.channels_last)

        def forward() -> list[Tensor]:
            # Inside of a graph, so that it casts the weights in every replay.
            with settings.autocast(settings.dtype if autocast else None):
                return network(images)

        if not training:
            network.eval()

            def infer() -> list[Tensor]:
                with torch.no_grad():
                    return forward()

            return infer
        network.train()
        weights = [x for x in network.parameters() if x.requires_grad]
        with torch.no_grad():
            grads = [torch.randn_like(x, memory_format=torch.channels_last) for x in forward()]
        return lambda: torch.autograd.grad(forward(), weights, grads)

    return make

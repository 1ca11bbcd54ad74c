"""The towers of RetinaNet's attentional heads."""

import torch
from torch import Tensor, nn

from .fused import tower


class AttentionTower(nn.ModuleList):
    """Layers of attention, each with a norm, or one for each level, if at all."""

    def forward(self, x: Tensor, level: int) -> Tensor:
        """
        Args:
            x: (N, C, H, W).
            level: index of the level, which picks the norms.

        Returns:
            (N, C, H, W).
        """
        if not torch.jit.is_scripting():
            norms = [layer["norms"] if "norms" in layer else [None] for layer in self]
            norms = [of_levels[level % len(of_levels)] for of_levels in norms]
            fused = tower(x, [layer["attention"] for layer in self], norms)
            if fused is not None:
                return fused
        for layer in self:
            x = layer["attention"](x)
            if "norms" in layer:
                norms = layer["norms"]
                for i, norm in enumerate(norms):  # TorchScript takes no variable as an index
                    if i == level % len(norms):
                        x = norm(x)
            x = torch.relu(x)
        return x

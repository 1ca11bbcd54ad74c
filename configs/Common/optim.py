"""Optimizers; ``params.model`` is the model that is trained."""

import torch
from detectron2.config import LazyCall as L

from sasa_det.engine.optimizer import parameter_groups

SGD = L(torch.optim.SGD)(
    params=L(parameter_groups)(
        base_lr="${..lr}",
        weight_decay=1e-4,
        weight_decay_norm=0.0,
        logit_lr_factor=1.0,
        weight_decay_logit=None,
        logit_warmup_iters=0,
    ),
    lr=0.02,
    momentum=0.9,
    fused=True,
)

AdamW = L(torch.optim.AdamW)(params=SGD.params, lr=1e-4, fused=True)

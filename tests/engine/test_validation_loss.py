"""Losses on data that is not trained on leave the model as it was."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import KRCNNConvDeconvUpsampleHead
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn

from sasa_det.engine.train_loop import StepTrainer
from sasa_det.evaluation.validation_loss import validation_losses


class Detector(nn.Module):
    """As detectron2's dense detectors: losses in training mode, a normalizer that moves."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.dropout = nn.Dropout(0.5)
        self.loss_normalizer = 7.0
        # Whose loss_normalizer is an option, "visible".
        self.keypoints = KRCNNConvDeconvUpsampleHead(
            ShapeSpec(channels=4), num_keypoints=3, conv_dims=[4], loss_normalizer="visible"
        )

    def forward(self, batch):
        assert self.training and self.keypoints.loss_normalizer == "visible"
        before = getattr(self, "loss_normalizer", 100.0)
        self.loss_normalizer = 0.9 * before + 0.1 * len(batch)
        get_event_storage().put_scalar("seen", len(batch))
        x = self.dropout(self.norm(torch.stack(batch)))
        return {"loss_a": x.square().sum() / self.loss_normalizer, "loss_b": x.abs().max()}


def test_losses_are_those_of_the_running_statistics_and_nothing_changes():
    torch.manual_seed(0)
    model = Detector()
    model.norm.running_mean.copy_(torch.tensor([1.0, -2.0]))
    model.norm.running_var.copy_(torch.tensor([4.0, 0.25]))
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [list(torch.randn(size, 2)) for size in (3, 2, 1)]
    state = torch.get_rng_state()
    with EventStorage() as storage:
        losses = validation_losses(model, batches)
        assert "seen" not in storage.histories()
    expected = {"loss_a": 0.0, "loss_b": 0.0}
    for batch in batches:
        x = (torch.stack(batch) - before["norm.running_mean"]) / torch.sqrt(
            before["norm.running_var"] + model.norm.eps
        )
        expected["loss_a"] += float(x.square().sum() / (90 + 0.1 * len(batch))) / 3
        expected["loss_b"] += float(x.abs().max()) / 3
    expected["total_loss"] = sum(expected.values())
    assert losses == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert model.loss_normalizer == 7.0
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_come_back_from_a_failure():
    model = Detector()
    model.norm.eval()
    with pytest.raises(TypeError):
        validation_losses(model, [None])
    assert model.training and model.dropout.training and not model.norm.training
    assert model.loss_normalizer == 7.0


def test_checkpoints_hold_the_normalizers_of_dense_detectors_alone():
    model = Detector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = StepTrainer(model, [], optimizer, seed=0).state_dict()
    assert state["loss_normalizers"] == {"": 7.0}

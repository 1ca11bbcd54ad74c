"""Checks of a sharded model, which process_checks.py runs in two processes on CPUs."""

import copy
from contextlib import nullcontext
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.distributed.tensor import DTensor

from sasa_det.checkpoint import Checkpointer, read_checkpoint
from sasa_det.checkpoint.sharding import full_state, full_tensor
from sasa_det.engine import load_config
from sasa_det.engine.distributed import distribute, unsharded, without_sync
from sasa_det.engine.hooks import ModelEma
from sasa_det.engine.train_loop import NonFiniteError, StepTrainer
from sasa_det.utils.seeding import seed_everything


def check_shards(folder: Path) -> None:
    check_retinanet(folder)
    check_rcnn()
    check_steps()


# ------------------------------------------------------------------------------- whole detectors


def samples(number, seed, num_classes):
    """Random images with two boxes each."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(number):
        instances = Instances((64, 64))
        instances.gt_boxes = Boxes(torch.tensor([[4.0, 4.0, 30.0, 34.0], [20.0, 8.0, 60.0, 60.0]]))
        instances.gt_classes = torch.randint(num_classes, (2,), generator=generator)
        image = torch.randint(256, (3, 64, 64), generator=generator, dtype=torch.uint8)
        found.append({"image": image, "instances": instances, "height": 64, "width": 64})
    return found


def losses_and_gradients(model, batch):
    """Sum the losses of a batch, whose two parts are accumulated, and return its gradients."""
    model.zero_grad()
    with EventStorage():
        seed_everything(0, comm.get_rank())
        with without_sync(model):
            one = sum(model(batch[:1]).values())
            one.backward()
        other = sum(model(batch[1:]).values())
        other.backward()
    parameters = (p for p in model.parameters() if p.requires_grad)
    return torch.stack([one, other]).detach(), [full_tensor(p.grad) for p in parameters]


def assert_equal_training(copied, sharded, batch):
    losses, gradients = losses_and_gradients(sharded, batch)
    expected_losses, expected = losses_and_gradients(copied, batch)
    torch.testing.assert_close(losses, expected_losses)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


def built(cfg):
    """A model, and one of the same weights that is sharded; each process asks for others."""
    torch.manual_seed(comm.get_rank())
    model = build_model(cfg)
    sharded = distribute(copy.deepcopy(model), shard=True)
    first = [full_tensor(parameter.detach()) for parameter in sharded.parameters()]
    # DDP takes the weights of the first process as well.
    copied = distribute(model)
    assert all(map(torch.equal, first, copied.parameters()))
    return copied, sharded


def check_retinanet(folder):
    opts = ["MODEL.RETINANET.NUM_CLASSES", "3", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]
    for part in ("FPN", "RETINANET"):  # which see single pixels
        opts += [f"MODEL.{part}.NORM", "FrozenBN"]
    cfg = load_config("configs/Quick/retinanet_SASA.yaml", opts)
    copied, sharded = built(cfg)
    rank = comm.get_rank()
    assert_equal_training(copied, sharded, samples(2, rank, 3))

    total = sum(p.numel() for p in sharded.parameters())
    held = sum(p.to_local().numel() for p in sharded.parameters())
    assert 0.45 < held / total < 0.55
    optimizer = torch.optim.AdamW(sharded.parameters())
    optimizer.step()
    states = [s["exp_avg"] for s in optimizer.state.values()]
    assert 0.45 < sum(s.to_local().numel() for s in states) / total < 0.55

    # What is evaluated and what is saved, of the model and of its average.
    ema = ModelEma(sharded, 0.9)
    ema.update()
    average = full_state(ema.state_dict(), keep=True)["weights"]
    optimizer.step()
    Checkpointer(sharded, str(folder), ema=ema).save("model_final", iteration=1)
    comm.synchronize()
    saved = read_checkpoint(folder / "model_final.pth")
    alone = copied.module
    state = full_state(sharded.state_dict(), keep=True)  # with this process' batch statistics
    for weights, applied in (({}, None), (average, ema)):
        alone.load_state_dict({**state, **weights})
        assert_equal_inference(alone, sharded, applied)
    if rank == 0:
        assert_equal(saved["model"], state)
    assert_equal(saved["ema"]["weights"], average)

    # What was saved is loaded, and the weights are shards again.
    with torch.no_grad():
        for parameter in sharded.parameters():
            parameter.zero_()
    other = ModelEma(sharded, 0.9)
    Checkpointer(sharded, str(folder), ema=other).resume_or_load("")
    assert_equal(full_state(sharded.state_dict(), keep=True), saved["model"])
    assert_equal(full_state(other.state_dict(), keep=True)["weights"], average)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    alone.load_state_dict(saved["model"])
    assert_equal_training(copied, sharded, samples(2, rank + 9, 3))


def assert_equal(weights, expected):
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def assert_equal_inference(alone, sharded, ema):
    """Run two images in one process and one in the other, each on its own."""
    batch = samples(2 - comm.get_rank(), 5, 3)
    alone.eval(), sharded.eval()
    with torch.no_grad():
        expected = [alone([image])[0]["instances"] for image in batch]
        with ema.applied() if ema else nullcontext(), unsharded(sharded):
            found = [sharded([image])[0]["instances"] for image in batch]
    for one, other in zip(found, expected, strict=True):
        assert len(one) > 10 and torch.equal(one.scores, other.scores)
        assert torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
    alone.train(), sharded.train()


def check_rcnn():
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    features = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = features
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [64]]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 64
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    copied, sharded = built(cfg)
    assert_equal_training(copied, sharded, samples(2, comm.get_rank(), 3))


# ------------------------------------------------------------------------------------ one step


class Linear(nn.Module):
    """A linear map, whose last row, in the second process, may get a gradient that is no number."""

    def __init__(self, bad=False):
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(5, 4)
        self.bad = bad

    def forward(self, batch):
        loss = self.map(torch.stack([sample["x"] for sample in batch])).square().mean()
        if self.bad:
            loss = loss + (self.map.weight[3] * 0).abs().sqrt().sum()
        return {"loss": loss}


def stepped(model, **options):
    """Take a step on data of this process; return the trainer and the norm of the gradient."""
    data = [[{"x": torch.full((5,), float(comm.get_rank() + 1))}]]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = StepTrainer(model, data, optimizer, seed=0, **options)
    with EventStorage() as storage:
        trainer.iter = 0
        trainer.run_step()
    return trainer, storage.latest()["gradient_norm"][0]


def weight(model):
    return full_tensor(model.map.weight.detach()).clone()


def check_steps():
    before = Linear().map.weight.detach().clone()
    copied, sharded = distribute(Linear()), distribute(Linear(), shard=True)
    _, expected = stepped(copied)
    _, norm = stepped(sharded)
    assert abs(norm - expected) < 1e-6 * expected
    torch.testing.assert_close(weight(sharded), copied.module.map.weight.detach())

    # The norm that is clipped is that of all shards.
    sharded = distribute(Linear(), shard=True)
    initial = full_state(sharded.state_dict(), keep=True)
    stepped(sharded, max_norm=0.01)
    change = [full_tensor(p.detach()) - initial[name] for name, p in sharded.named_parameters()]
    norm = torch.cat([value.flatten() for value in change]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.01), rtol=1e-3, atol=0)

    # Both processes hear of what only the second one's shard shows.
    sharded = distribute(Linear(bad=True), shard=True)
    try:
        stepped(sharded)
    except NonFiniteError as error:
        assert "the gradient of map.weight is not finite" in str(error)
    else:
        raise AssertionError("the step was taken")
    assert torch.equal(weight(sharded), before)
    # Where losses are scaled, both leave the step out.
    trainer, _ = stepped(sharded, precision=torch.float16)
    assert torch.equal(weight(sharded), before)
    assert trainer.grad_scaler.get_scale() == 2.0**15

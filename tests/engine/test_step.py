"""One step of training, held against what it should compute."""

import itertools

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from sasa_det.engine import UsageError
from sasa_det.engine.train_loop import NonFiniteError, StepTrainer


class Regression(nn.Module):
    """Two losses of a linear map, with dropout if asked for."""

    def __init__(self, dropout=0.0, dtype=torch.double):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 3, dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch):
        x = torch.stack([sample["x"] for sample in batch])
        y = torch.stack([sample["y"] for sample in batch])
        error = self.linear(self.dropout(x)) - y
        return {"loss_square": error.square().mean(), "loss_absolute": error.abs().mean()}


class Batches:
    """Endless batches that know where they are, as the training loader does."""

    def __init__(self, size, parts=1, dtype=torch.double):
        self.size, self.parts, self.dtype, self.given = size, parts, dtype, 0

    def __iter__(self):
        for number in itertools.count(self.given):
            generator = torch.Generator().manual_seed(number // self.parts)
            x = torch.randn(self.size, 5, generator=generator, dtype=self.dtype)
            y = torch.randn(self.size, 3, generator=generator, dtype=self.dtype)
            samples = [
                {"x": a, "y": b, "file_name": f"{number}_{i}.png", "image_id": i}
                for i, (a, b) in enumerate(zip(x, y, strict=True))
            ]
            part = self.size // self.parts
            first = number % self.parts * part
            self.given += 1
            yield samples[first : first + part]

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


def trainer(model, data, lr=0.1, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return StepTrainer(model, data, optimizer, seed=7, **options)


def steps(runner, first, last):
    with EventStorage(first) as storage:
        for runner.iter in range(first, last):
            runner.run_step()
            storage.step()
    return storage


def test_parts_of_a_batch_add_up_to_the_batch():
    whole, parts = Regression(), Regression()
    steps(trainer(whole, Batches(8)), 0, 3)
    storage = steps(trainer(parts, Batches(8, parts=4), accumulation_steps=4), 0, 3)
    assert not torch.equal(whole.linear.weight, Regression().linear.weight)
    torch.testing.assert_close(parts.linear.weight, whole.linear.weight, rtol=1e-12, atol=1e-12)
    batch = next(iter(Batches(8)))
    expected = sum(loss.item() for loss in Regression()(batch).values())
    assert storage.history("total_loss").values()[0][0] == pytest.approx(expected, rel=1e-12)


def test_all_gradients_are_clipped_together():
    free, clipped = Regression(), Regression()
    before = torch.cat([p.detach().flatten() for p in free.parameters()])
    storage = steps(trainer(free, Batches(8), lr=1.0), 0, 1)
    steps(trainer(clipped, Batches(8), lr=1.0, max_norm=0.25), 0, 1)
    gradient = before - torch.cat([p.detach().flatten() for p in free.parameters()])
    change = before - torch.cat([p.detach().flatten() for p in clipped.parameters()])
    assert gradient.norm() > 0.5
    assert storage.history("gradient_norm").latest() == pytest.approx(gradient.norm().item())
    torch.testing.assert_close(change, gradient * 0.25 / gradient.norm(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("max_norm", [None, 0.25])
def test_finite_gradients_whose_norm_exceeds_float32_are_a_step(max_norm):
    """The squares of 1e25 are no numbers of float32, and the gradient is none to stop for."""
    plain, large = (Regression(dtype=torch.float) for _ in range(2))
    for model, factor in ((plain, 1.0), (large, 1e25)):
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient, factor=factor: gradient * factor)
    data = Batches(8, dtype=torch.float)
    start = plain.linear.weight.detach().clone()
    storage = steps(trainer(plain, Batches(8, dtype=torch.float), lr=1.0, max_norm=0.25), 0, 1)
    norm = storage.history("gradient_norm").latest()
    rate = 1.0 if max_norm else 0.25e-25 / norm
    storage = steps(trainer(large, data, lr=rate, max_norm=max_norm), 0, 1)
    assert storage.history("gradient_norm").latest() == pytest.approx(norm * 1e25, rel=1e-6)
    change = large.linear.weight - start
    torch.testing.assert_close(change, plain.linear.weight - start, rtol=1e-5, atol=1e-7)


class Poisoned(Batches):
    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if number == 2:
                batch[1]["x"] = batch[1]["x"] * float("nan")
            yield batch


class _BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


class BadGradient(Regression):
    def forward(self, batch):
        losses = super().forward(batch)
        penalty = _BadBackward.apply(self.linear.bias).square().sum()
        return {**losses, "loss_bias": penalty}


@pytest.mark.parametrize(
    "model, data, last, message",
    [
        (
            Regression,
            Poisoned(4),
            2,
            "iteration 2: loss_square is nan, loss_absolute is nan; images of the batch: "
            "2_0.png (id 0), 2_1.png (id 1), 2_2.png (id 2), 2_3.png (id 3)",
        ),
        (BadGradient, Batches(2), 0, "iteration 0: the gradient of linear.bias is not finite"),
    ],
)
def test_what_is_not_finite_stops_the_run_before_the_step(model, data, last, message):
    model = model()
    runner = trainer(model, data)
    if last:
        steps(runner, 0, last)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    momentum = [s["momentum_buffer"].clone() for s in runner.optimizer.state.values()]
    with pytest.raises(NonFiniteError) as error:
        steps(runner, last, last + 1)
    assert message in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    after = [s["momentum_buffer"] for s in runner.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, momentum, strict=True))


def test_a_batch_norm_with_one_value_is_named_with_the_image():
    model = Regression()
    model.linear = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(UsageError) as error:
        steps(trainer(model, Batches(1)), 4, 5)
    message = "iteration 4, image 0_0.png (id 0): linear.1 is a batch norm that has one value per"
    assert str(error.value).startswith(message)
    steps(trainer(model, Batches(2)), 0, 1)


def test_resumed_steps_are_bit_equal():
    """With dropout and other random numbers drawn between the runs."""
    unbroken = Regression(dropout=0.5)
    steps(trainer(unbroken, Batches(4)), 0, 6)
    first = Regression(dropout=0.5)
    runner = trainer(first, Batches(4))
    steps(runner, 0, 3)
    state = {"model": first.state_dict(), "trainer": runner.state_dict()}
    torch.rand(11)
    second = Regression(dropout=0.5)
    second.load_state_dict(state["model"])
    runner = trainer(second, Batches(4))
    runner.load_state_dict(state["trainer"])
    steps(runner, 3, 6)
    for a, b in zip(second.parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_optimizer_has_the_rate_it_was_given():
    runner = trainer(Regression(), Batches(4), lr=0.1)
    steps(runner, 0, 1)
    other = trainer(Regression(), Batches(4), lr=0.01)
    other.load_state_dict(runner.state_dict())
    assert [group["lr"] for group in other.optimizer.param_groups] == [0.01]
    assert len(other.optimizer.state) == 2


def test_bfloat16_computes_in_bfloat16_and_keeps_float32():
    seen = []
    models = [Regression(dtype=torch.float), Regression(dtype=torch.float)]
    models[1].linear.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    for model, precision in zip(models, (None, torch.bfloat16), strict=True):
        steps(trainer(model, Batches(4, dtype=torch.float), precision=precision), 0, 5)
    assert set(seen) == {torch.bfloat16}
    exact, rounded = (model.linear.weight for model in models)
    assert rounded.dtype == torch.float and not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.02)


def test_float16_skips_a_step_whose_scaled_gradient_overflows():
    model = Regression(dtype=torch.float)
    before = model.linear.weight.clone()
    runner = trainer(model, Batches(4, dtype=torch.float), precision=torch.float16)
    runner.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    steps(runner, 0, 1)
    assert torch.equal(model.linear.weight, before)
    assert runner.grad_scaler.get_scale() == 2.0**59
    # Training begins when the scale has come down.
    steps(runner, 1, 60)
    assert not torch.equal(model.linear.weight, before)
    other = trainer(Regression(dtype=torch.float), Batches(4), precision=torch.float16)
    other.load_state_dict(runner.state_dict())
    assert other.grad_scaler.get_scale() == runner.grad_scaler.get_scale()


class Diverged(Regression):
    """As detectron2's RPN, which looks at its proposals."""

    def forward(self, batch):
        raise FloatingPointError(
            "Predicted boxes or scores contain Inf/NaN. Training has diverged."
        )


def test_proposals_that_are_not_finite_are_named_with_their_images():
    with pytest.raises(
        NonFiniteError, match=r"^iteration 0: Predicted boxes .* batch: 0_0.png \(id 0\)"
    ):
        steps(trainer(Diverged(), Batches(2)), 0, 1)

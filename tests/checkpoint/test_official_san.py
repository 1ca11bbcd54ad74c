"""A file of the official SAN release gives the logits of the paper's formulas."""

import pytest
import torch
import torch.nn.functional as F

from sasa_det.checkpoint import convert_checkpoint
from sasa_det.checkpoint.reading import read_checkpoint
from sasa_det.modeling import SAN
from tests.checkpoint.test_transfer import san_release

NUM_BLOCKS = (2, 1, 2, 4, 1)


def make_weights(kind):
    """Return weights of a released model by name, such that no map grows or vanishes."""
    torch.manual_seed(0)
    weights = {}
    for name, shape in san_release(kind, NUM_BLOCKS).items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
        elif len(shape) > 1:
            weights[name] = torch.randn(shape) * shape[1] ** -0.5
        elif name.endswith(("running_var", "weight")):
            weights[name] = 0.5 + torch.rand(shape)
        else:
            weights[name] = 0.3 * torch.randn(shape)
        if kind == "patchwise" and "conv_w.5" in name:  # which no softmax follows
            weights[name] *= 0.1
    return weights


class Formulas:
    """The network as the paper writes it, in float64, one place of the windows after another."""

    def __init__(self, weights, kind):
        self.weights = {name: x.double() for name, x in weights.items()}
        self.kind = kind

    def linear(self, name, x):
        matrix, bias = self.weights[f"{name}.weight"].flatten(1), self.weights.get(f"{name}.bias")
        result = torch.einsum("oc,nchw->nohw", matrix, x)
        return result if bias is None else result + bias[:, None, None]

    def rectified_norm(self, name, x):
        mean, var, weight, bias = (
            self.weights[f"{name}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 1e-5).sqrt() * weight + bias).clamp(min=0)

    def mapping(self, name, x):
        for i in (0, 3):
            x = self.linear(f"{name}.{i + 2}", self.rectified_norm(f"{name}.{i}", x))
        return x

    def attend(self, name, x, kernel_size):
        height, width = x.shape[2:]

        def windows(x):
            padded = F.pad(x, [kernel_size // 2] * 4, mode="reflect")
            return [
                padded[:, :, row : row + height, col : col + width]
                for row in range(kernel_size)
                for col in range(kernel_size)
            ]

        query, key, value = (self.linear(f"{name}.conv{i}", x) for i in (1, 2, 3))
        if self.kind == "pairwise":
            rows, cols = (
                torch.linspace(-1, 1, size, dtype=x.dtype).view(shape).expand(1, 1, height, width)
                for size, shape in ((height, (-1, 1)), (width, (1, -1)))
            )
            position = self.linear(f"{name}.conv_p", torch.cat([cols, rows], 1))
            logits = [
                self.mapping(
                    f"{name}.conv_w",
                    torch.cat([query - other, (position - place).expand(len(x), -1, -1, -1)], 1),
                )
                for other, place in zip(windows(key), windows(position), strict=True)
            ]
            weights = torch.stack(logits).softmax(0)
        else:
            keys = torch.stack(windows(key), 2).flatten(1, 2)
            found = self.mapping(f"{name}.conv_w", torch.cat([query, keys], 1))
            weights = found.unflatten(1, (-1, kernel_size**2)).movedim(2, 0)
        # Channel c has the weights of group c modulo their number.
        shared = value.shape[1] // weights.shape[2]
        pairs = zip(weights, windows(value), strict=True)
        return sum(weight.repeat(1, shared, 1, 1) * other for weight, other in pairs)

    def logits(self, x):
        x = self.rectified_norm("bn_in", self.linear("conv_in", x.double()))
        for stage, count in enumerate(NUM_BLOCKS):
            x = self.linear(f"conv{stage}", F.max_pool2d(x, 2))
            for block in range(count):
                name = f"layer{stage}.{block}"
                out = self.rectified_norm(f"{name}.bn1", x)
                out = self.attend(f"{name}.sam", out, 3 if stage == 0 else 7)
                x = x + self.linear(f"{name}.conv", self.rectified_norm(f"{name}.bn2", out))
            x = self.rectified_norm(f"bn{stage}", x)
        return x.mean((2, 3)) @ self.weights["fc.weight"].T + self.weights["fc.bias"]


@pytest.mark.parametrize("kind", ["pairwise", "patchwise"])
def test_logits(kind, tmp_path):
    weights = make_weights(kind)
    released = {f"module.{name}": weight for name, weight in weights.items()}
    torch.save({"epoch": 100, "state_dict": released}, tmp_path / "released.pth")
    model = SAN(depth=10, attention=kind, num_classes=1000).eval()
    convert_checkpoint(tmp_path / "released.pth", tmp_path / "converted.pth", model)
    converted = read_checkpoint(tmp_path / "converted.pth")["model"]
    # A conversion leaves the classifier out.
    classifier = {f"linear.{x}": weights[f"fc.{x}"] for x in ("weight", "bias")}
    model.load_state_dict({**converted, **classifier}, strict=True)
    formulas = Formulas(weights, kind)
    for size in ((128, 128), (224, 224), (160, 192)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            actual, expected = model(x)["linear"].double(), formulas.logits(x)
        assert expected.std() > 0.1
        error = (actual - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, (size, error)

"""1x1 convolutions as products equal the convolutions that they stand for."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from sasa_det.layers import LocalSelfAttention2d
from sasa_det.modeling import use_products
from sasa_det.modeling.pointwise import NormedPointwiseConv2d, PointwiseConv2d
from sasa_det.ops import cpu


def spread(norm):
    if norm is not None and hasattr(norm, "running_mean"):
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.uniform_(-1, 1.5)
        norm.bias.data.normal_(0, 0.3)
    return norm


LAYERS = {
    "plain": lambda: nn.Conv2d(12, 20, 1, bias=False),
    "with a bias and a stride": lambda: nn.Conv2d(12, 20, 1, stride=2),
    "detectron2's": lambda: Conv2d(12, 20, 1, activation=torch.relu),
    **{
        f"detectron2's, {norm}": lambda norm=norm: Conv2d(
            *(12, 20, 1, 2), bias=norm == "FrozenBN", norm=spread(get_norm(norm, 20))
        )
        for norm in ("BN", "FrozenBN", "SyncBN")
    },
    "detectron2's, GN": lambda: Conv2d(12, 20, 1, norm=nn.GroupNorm(4, 20)),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("kind", LAYERS)
def test_equal_convolutions_and_their_gradients(kind, training):
    torch.manual_seed(0)
    layer = LAYERS[kind]().train(training and "SyncBN" not in kind)
    reference = copy.deepcopy(layer).double()
    keys = list(layer.state_dict())
    assert use_products(layer) is layer
    assert type(layer) is (NormedPointwiseConv2d if "detectron2" in kind else PointwiseConv2d)
    assert list(layer.state_dict()) == keys
    x = torch.randn(3, 12, 7, 5, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    output, expected = layer(x), reference(exact)
    grad = torch.randn_like(output)
    output.backward(grad)
    expected.backward(grad.double())
    pairs = [(output, expected), (x.grad, exact.grad)]
    for ours, theirs in zip(layer.parameters(), reference.parameters(), strict=True):
        pairs.append((ours.grad, theirs.grad))
    pairs += zip(layer.buffers(), reference.buffers(), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=2e-5)
    if not layer.training:
        with torch.no_grad():
            torch.testing.assert_close(layer(x), output)


def test_what_is_more_than_a_pointwise_convolution_stays():
    class Other(nn.Conv2d):
        pass

    layers = [nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, padding=1)]
    layers += [Other(4, 4, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))]
    kinds = [type(layer) for layer in layers]
    attention = LocalSelfAttention2d(4, 4, num_heads=2)
    use_products(nn.Sequential(*layers, attention))
    assert [type(layer) for layer in layers] == kinds
    assert type(attention.query) is nn.Conv2d


@pytest.mark.skipif(bool(cpu.MISSING), reason=str(cpu.MISSING))
def test_elsewhere_the_convolution_runs():
    layer = use_products(nn.Conv2d(4, 6, 1))
    x = torch.randn(1, 4, 3, 3)
    assert "Products" in layer(x).grad_fn.name()
    assert "Convolution" in layer.double()(x.double()).grad_fn.name()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.float()(x).dtype == torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == (1, 6, 3, 3)
    scripted = torch.jit.script(layer)
    torch.testing.assert_close(scripted(x), layer(x))
    norm = use_products(Conv2d(4, 6, 1, norm=FrozenBatchNorm2d(6)))
    torch.testing.assert_close(torch.jit.script(norm)(x), norm(x))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_what_convolutions_can_do_and_products_cannot():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 1, stride=(1, 2))
    layer, x = use_products(copy.deepcopy(conv)), torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(layer(x), conv(x))
    torch.testing.assert_close(layer(x[0]), conv(x[0]))  # without a batch
    torch.testing.assert_close(torch.func.vmap(layer)(x[None]), conv(x)[None])
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 2 * 5 * 3 * 4 * 6
    with torch.no_grad(), forward_ad.dual_level():
        found, expected = (
            forward_ad.unpack_dual(f(forward_ad.make_dual(x, x))).tangent for f in (layer, conv)
        )
    torch.testing.assert_close(found, expected)
    layer.padding = (1, 1)
    assert layer(x).shape[2:] == (7, 4)


def test_gradients_of_gradients():
    layer, x = use_products(nn.Conv2d(3, 4, 1)), torch.randn(2, 3, 4, 5, requires_grad=True)
    exact = copy.deepcopy(layer).double()
    results = []
    for f, y in ((layer, x), (exact, x.detach().double().requires_grad_())):
        grads = torch.autograd.grad(f(y).square().sum(), [y, f.weight], create_graph=True)
        loss = sum(grad.square().sum() for grad in grads)
        results.append(torch.autograd.grad(loss, [y, f.weight, f.bias]))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)

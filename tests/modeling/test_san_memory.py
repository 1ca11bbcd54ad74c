"""What of SAN runs without keeping its maps, beside the modules that it stands for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from sasa_det.engine.model_options import checkpoint_stages
from sasa_det.layers.replay import replayed
from sasa_det.layers.vector_attention import PAIRWISE_RELATIONS, PATCHWISE_RELATIONS
from sasa_det.modeling.backbone.san import SAN
from sasa_det.modeling.normed_products import normed_products, normed_relu
from sasa_det.modeling.pooled import pooled_product, pooled_stem
from sasa_det.ops import cpu

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=str(cpu.MISSING))

NORMS = [nn.BatchNorm2d, FrozenBatchNorm2d, lambda channels: nn.Identity()]


def randomize(module):
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -1, 1.5)
    return module


def assert_same(modules, x, ours, expected):
    """Compare outputs, gradients and buffers of two functions of modules and an input."""
    torch.manual_seed(0)
    twins, x_twin = copy.deepcopy(modules).double(), x.double().requires_grad_()
    x = x.clone().requires_grad_()
    outputs, exact = ours(modules, x), expected(twins, x_twin)
    assert all(output is not None for output in outputs)
    for output, other in zip(outputs, exact, strict=True):
        torch.testing.assert_close(output.double(), other, rtol=1e-4, atol=1e-4)
    grads = [torch.randn_like(output) for output in outputs]
    torch.autograd.backward(outputs, grads)
    torch.autograd.backward(exact, [grad.double() for grad in grads])
    torch.testing.assert_close(x.grad.double(), x_twin.grad, rtol=1e-3, atol=1e-3)
    pairs = zip(modules.parameters(), twins.parameters(), strict=True)
    for parameter, twin in pairs:
        torch.testing.assert_close(parameter.grad.double(), twin.grad, rtol=1e-3, atol=1e-3)
    for buffer, twin in zip(modules.buffers(), twins.buffers(), strict=True):
        torch.testing.assert_close(buffer.double(), twin.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_normed_products(norm, training):
    torch.manual_seed(0)
    layers = [nn.Conv2d(6, 4, 1), nn.Conv2d(6, 5, 1, bias=False), nn.Conv2d(6, 3, 1)]
    modules = randomize(nn.ModuleList([norm(6), *layers]).train(training))
    x = 1 + 2 * torch.randn(2, 6, 5, 7)

    def expected(m, x):
        normed = F.relu(m[0](x))
        return [layer(normed) for layer in m[1:]] + [x]

    assert_same(modules, x, lambda m, x: normed_products(x, m[0], m[1:]), expected)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_a_normed_product_of_which_one_result_is_used(used):
    torch.manual_seed(0)
    layers = [nn.Conv2d(6, 4, 1), nn.Conv2d(6, 5, 1)]
    modules = randomize(nn.ModuleList([nn.BatchNorm2d(6), *layers]))
    x = torch.randn(2, 6, 5, 7)

    def expected(m, x):
        normed = F.relu(m[0](x))
        zero = 0 * sum(p.sum() for p in m.parameters())
        return [[m[1](normed), m[2](normed), x][used] + zero]

    def one(m, x):
        zero = 0 * sum(p.sum() for p in m.parameters())
        return [normed_products(x, m[0], m[1:])[used] + zero]

    assert_same(modules, x, one, expected)


def test_a_normed_product_with_a_residual():
    torch.manual_seed(0)
    modules = randomize(nn.ModuleList([nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)]))
    x = torch.randn(2, 6, 5, 7)
    assert_same(
        modules,
        x,
        lambda m, x: normed_products(x, m[0], m[1:], residual=x)[:1],
        lambda m, x: [x + m[1](F.relu(m[0](x)))],
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_normed_relu(norm, training):
    torch.manual_seed(0)
    modules = randomize(nn.ModuleList([norm(6)]).train(training))
    x = 1 + 2 * torch.randn(2, 6, 5, 7)
    assert_same(*(modules, x, lambda m, x: [normed_relu(x, m[0])], lambda m, x: [F.relu(m[0](x))]))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [(6, 8), (7, 5), (1, 2), (1, 1), (40, 33)])
def test_pooled_stem(norm, size, monkeypatch):
    monkeypatch.setattr("sasa_det.modeling.pooled._NUMBERS_OF_BAND", 5 * 6 * 3)
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 5, 1, bias=False), nn.Conv2d(5, 4, 1, bias=False)]
    modules = randomize(nn.ModuleList([convolutions[0], norm(5), convolutions[1]]))
    x = 3 + torch.randn(2, 3, *size)
    assert_same(
        modules,
        x,
        lambda m, x: [pooled_stem(x, *m)],
        lambda m, x: [m[2](F.max_pool2d(F.relu(m[1](m[0](x))), 2, ceil_mode=True))],
    )


@pytest.mark.parametrize("size", [(7, 9), (6, 8)])
def test_pooled_product(size):
    modules = nn.ModuleList([nn.Conv2d(3, 5, 1, bias=False)])
    assert_same(
        modules,
        torch.randn(2, 3, *size),
        lambda m, x: [pooled_product(x, m[0])],
        lambda m, x: [m[0](F.max_pool2d(x, 2, ceil_mode=True))],
    )


def test_hooks_see_what_they_are_on():
    model, seen = SAN(out_features=["stem", "res2"]).eval(), []
    block = model.res2.blocks[0]
    for module in (block.norm1, block.attention, block.project, model.stem.conv):
        module.register_forward_hook(lambda *arguments: seen.append(1))
    model(torch.randn(1, 3, 20, 24))
    assert len(seen) == 4


STAGES = [
    *(("pairwise", relation, "BN") for relation in PAIRWISE_RELATIONS),
    *(("patchwise", relation, "BN") for relation in PATCHWISE_RELATIONS),
    *(("pairwise", "subtraction", norm) for norm in ("FrozenBN", "")),
    *(("patchwise", "concatenation", norm) for norm in ("FrozenBN", "")),
]


def step(model, x):
    """Return features, gradients, buffers, and the kinds of the nodes of autograd behind res2."""
    model = copy.deepcopy(model)
    for _ in range(2):  # of which both count for the running statistics
        outputs = model(x)
    names = [type(output.grad_fn).__name__ for output in outputs.values()]
    sum(output.square().sum() for output in outputs.values()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {**outputs, **gradients, **dict(model.named_buffers())}, names


@pytest.mark.parametrize("attention,relation,norm", STAGES)
def test_stages_that_run_again(attention, relation, norm):
    torch.manual_seed(0)
    options = {"attention": attention, "relation": relation, "norm": norm}
    model = SAN(width_multiplier=0.25, out_features=["stem", "res2"], **options)
    x = torch.randn(2, 3, 13, 18)
    expected, names = step(model, x)
    assert not any("Replayed" in name for name in names)
    checkpoint_stages(model, ["stem", "res2"])
    actual, names = step(model, x)
    assert all("Replayed" in name for name in names)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("attention", ["pairwise", "patchwise"])
def test_what_stages_that_run_again_keep(attention):
    model, kept = SAN(attention=attention, out_features=["res2"]), {}
    checkpoint_stages(model, ["stem", "res2"])

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = model(torch.randn(1, 3, 64, 64))["res2"]
    numbers = sum(count for storage, count in kept.items() if storage not in parameters)
    # The image, the maps that both stages have entered, what attention has summed up (blocks are
    # four times as wide, and res2 has a quarter of the pixels), and moments and hidden maps.
    pixels, of_attention = 32 * 32, 2 * 64 // 4 + 64 // 4
    assert numbers < (3 * 4 + 64 + 64 + of_attention + 12) * pixels
    output.sum().backward()


def test_other_stages_run_as_checkpoints_of_pytorch():
    x, names = torch.randn(1, 3, 20, 24), []
    for change in range(5):
        backend = "reference" if change == 4 else None
        model = SAN(width_multiplier=0.25, out_features=["stem"], backend=backend)
        if change == 1:
            model.stem.blocks[0].norm2.register_forward_hook(lambda *arguments: None)
        elif change == 2:
            model.stem.out_norm = nn.GroupNorm(2, 16)
        elif change == 3:
            model.stem.blocks[0].project.bias.register_hook(lambda grad: 2 * grad)
        checkpoint_stages(model, ["stem"])
        runs = []
        if change:
            model.stem.transition.register_forward_hook(lambda *arguments, to=runs: to.append(1))
        output = model(x)["stem"]
        names.append(type(output.grad_fn).__name__)
        output.sum().backward()
        assert len(runs) == (2 if change else 0)
    assert ["Replayed" in name for name in names] == [True, False, False, False, False]


@pytest.mark.parametrize("norms", [(1, 0), (0, 1)])
def test_a_second_run_that_differs_is_refused(norms):
    norm, runs = nn.BatchNorm2d(3, affine=False), iter(norms)

    def run(x):
        return normed_relu(x, norm) if next(runs) else x.relu()

    output = replayed(run, torch.randn(1, 3, 4, 4, requires_grad=True), list)
    with pytest.raises(RuntimeError, match="did not run a function as the forward pass did"):
        output.sum().backward()


def test_parameters_that_are_replaced_before_the_second_run_are_refused():
    model = SAN(width_multiplier=0.25, out_features=["stem"])
    checkpoint_stages(model, ["stem"])
    output = model(torch.randn(1, 3, 20, 24))["stem"]
    model.stem.out_norm.weight = nn.Parameter(torch.ones(16))
    with pytest.raises(RuntimeError, match="Parameters were replaced"):
        output.sum().backward()

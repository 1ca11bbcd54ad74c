"""Layers are called wherever calling them does more than their weights tell."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune

from sasa_det.layers import (
    AttentionStem,
    LocalSelfAttention2d,
    PairwiseAttention2d,
    PatchwiseAttention2d,
)
from sasa_det.layers.plain import is_plain_pointwise
from sasa_det.layers.projection import project


class LoRA(nn.Conv2d):
    """A convolution with an update of rank 1, as adapters make them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.down = nn.Parameter(torch.randn(1, self.in_channels, 1, 1))
        self.up = nn.Parameter(torch.randn(self.out_channels, 1, 1, 1))

    def forward(self, x):
        return super().forward(x) + nn.functional.conv2d(
            nn.functional.conv2d(x, self.down), self.up
        )


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Scaled(torch.Tensor):
    """A weight whose products come out doubled, as those of quantized weights come out scaled."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        output = super().__torch_function__(function, types, args, kwargs)
        return 2 * output if function is torch.conv2d else output


def conv(**options):
    return nn.Conv2d(6, 4, 1, **{"bias": False, **options})


def hooked(register, hook):
    layer = conv()
    getattr(layer, register)(hook)
    return layer


def with_forward(layer):
    layer.forward = lambda x: 2 * nn.functional.conv2d(x, layer.weight)
    return layer


def with_parametrization():
    layer = conv()
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def with_subclass_of_tensor():
    layer = conv()
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Scaled))
    return layer


NOT_PLAIN = {
    "stride": lambda: conv(stride=2),
    "padding": lambda: conv(padding=1),
    "groups": lambda: conv(groups=2),
    "subclass": lambda: LoRA(6, 4, 1, bias=False),
    "another module": lambda: nn.Sequential(conv(), nn.ReLU()),
    "forward hook": lambda: hooked("register_forward_hook", lambda m, i, o: 2 * o),
    "forward pre-hook": lambda: hooked("register_forward_pre_hook", lambda m, i: (2 * i[0],)),
    "backward hook": lambda: hooked("register_full_backward_hook", lambda m, i, o: (2 * i[0],)),
    "backward pre-hook": lambda: hooked(
        "register_full_backward_pre_hook", lambda m, o: (2 * o[0],)
    ),
    "replaced forward": lambda: with_forward(conv()),
    "parametrization": with_parametrization,
    "weight norm": lambda: parametrizations.weight_norm(conv()),
    "spectral norm": lambda: nn.utils.spectral_norm(conv()).eval(),
    "pruning": lambda: prune.l1_unstructured(conv(), "weight", amount=0.5),
    "subclass of tensor": with_subclass_of_tensor,
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_project_calls_what_is_more_than_its_weight(kind):
    torch.manual_seed(0)
    layer, x = NOT_PLAIN[kind](), torch.randn(2, 6, 4, 4)
    assert is_plain_pointwise(conv()) and not is_plain_pointwise(layer)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, expected = project(ours, [layer])[0], layer(theirs)
    assert torch.equal(actual, expected)
    actual.sum().backward()
    expected.sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_global_hooks_see_every_layer():
    layers, seen = [conv(), conv()], []
    hook = register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        project(torch.randn(1, 6, 4, 4), layers)
    finally:
        hook.remove()
    assert seen == layers


LAYERS = {
    "local": lambda: LocalSelfAttention2d(8, 8, 3, 2),
    "without content": lambda: LocalSelfAttention2d(8, 8, 3, 2, content=False),
    "absolute": lambda: LocalSelfAttention2d(8, 8, 3, 2, position="absolute"),
    "pairwise": lambda: PairwiseAttention2d(8, 8, 3),
    "patchwise": lambda: PatchwiseAttention2d(8, 8, 3),
    "mixture": lambda: AttentionStem(8, 8, 2),
    "pointwise": lambda: AttentionStem(8, 8, 2, values="pointwise"),
    "convolution": lambda: AttentionStem(8, 8, 2, values="convolution"),
    "frozen": lambda: AttentionStem(8, 8, 2, norm=FrozenBatchNorm2d),
    "no norm": lambda: AttentionStem(8, 8, 2, norm=None),
}
PARTS = [
    (kind, name)
    for kind, make in LAYERS.items()
    for name, module in make().named_modules()
    if not list(module.children())
]


@pytest.mark.parametrize("kind,name", PARTS)
def test_hooks_of_every_part_of_a_layer_run(kind, name):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    part, calls = layer.get_submodule(name), []
    x = torch.randn(2, 8, 5, 6, requires_grad=True)
    part.register_forward_hook(lambda *_: calls.append("forward"))
    with torch.no_grad():
        layer.eval()(x)
        layer.train()(x)
    assert calls == ["forward"] * 2
    # PyTorch refuses backward hooks on and before an activation in place.
    if not name.startswith("weights."):
        part.register_full_backward_hook(lambda *_: calls.append("backward"))
        layer(x).sum().backward()
        assert calls == ["forward"] * 3 + ["backward"]


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_of_hooks_count(kind):
    """What a hook makes of a part's output is what the layer goes on with."""
    torch.manual_seed(0)
    layer = LAYERS[kind]().eval()
    x = torch.randn(2, 8, 5, 6)
    parts = [part for part in layer.modules() if not list(part.children())]
    with torch.no_grad():
        before = layer(x)
        for part in parts:
            hook = part.register_forward_hook(lambda module, inputs, output: output * 0.5 + 0.3)
            assert not torch.allclose(layer(x), before), part
            hook.remove()
        torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize("values", ["mixture", "pointwise", "convolution"])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_stem_with_adapters_equals_one_with_their_sum(values, gradients):
    torch.manual_seed(0)
    plain = AttentionStem(6, 8, 2, values=values).eval()
    adapted = AttentionStem(6, 8, 2, values=values).eval()
    adapted.load_state_dict(plain.state_dict())
    for name in ("query", "key"):
        adapter = LoRA(6, 8, 1, bias=False)
        adapter.weight.data.copy_(getattr(plain, name).weight)
        setattr(adapted, name, adapter)
        update = adapter.up.flatten(1) @ adapter.down.flatten(1)
        getattr(plain, name).weight.data += update[:, :, None, None]
    x = torch.randn(2, 6, 9, 7)
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(adapted(x), plain(x), rtol=1e-4, atol=1e-4)


class Shifted(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def test_a_subclass_of_a_norm_is_called():
    torch.manual_seed(0)
    stem, other = AttentionStem(3, 8, 2).eval(), AttentionStem(3, 8, 2, norm=Shifted).eval()
    other.load_state_dict(stem.state_dict())
    stem.norm.bias.data += 1
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(other(x), stem(x))

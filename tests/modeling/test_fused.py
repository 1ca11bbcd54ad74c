"""Blocks of attention that run as one piece compute what their modules compute."""

import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

import sasa_det.modeling.fused as fused
from sasa_det.layers import LocalSelfAttention2d
from sasa_det.modeling import AttentionRetinaNetHead
from sasa_det.modeling.backbone.sasa_resnet import AttentionBottleneckBlock
from sasa_det.ops import cpu

pytestmark = pytest.mark.skipif(bool(cpu.MISSING), reason=str(cpu.MISSING))


def spread_norms(module):
    """Give norms statistics, scales of both signs and shifts that matter."""
    for part in module.modules():
        if getattr(part, "running_mean", None) is not None:
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.5, 2)
            part.weight.data.uniform_(-1, 1.5)
            part.bias.data.normal_(0, 0.3)


def in_float64(module):
    """Return a copy that calls its modules one after another, with the reference operator."""
    module = copy.deepcopy(module).double()
    for part in module.modules():
        if isinstance(part, LocalSelfAttention2d):
            part.backend = "reference"
    return module


def assert_same(ours, theirs, inputs, reference_inputs, outputs, expected, tolerance=2e-5):
    torch.manual_seed(1)
    grads = [torch.randn_like(y) for y in outputs]
    torch.autograd.backward(outputs, grads)
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    pairs = {f"output {i}": pair for i, pair in enumerate(zip(outputs, expected, strict=True))}
    for i, (x, y) in enumerate(zip(inputs, reference_inputs, strict=True)):
        pairs[f"input {i}"] = (x.grad, y.grad)
    references = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        pairs[name] = (parameter.grad, references[name].grad)
    pairs.update((n, (b, theirs.get_buffer(n))) for n, b in ours.named_buffers())
    for name, (found, wanted) in pairs.items():
        if wanted is None:
            assert found is None, name
            continue
        scale = max(float(wanted.abs().max()), 1e-4)
        assert (found - wanted).abs().max() <= tolerance * scale, name


def make_block(norm="BN", stride=1, in_channels=32, **attention):
    torch.manual_seed(0)
    options = {"num_heads": 2, **attention}
    block = AttentionBottleneckBlock(
        in_channels, 32, bottleneck_channels=16, stride=stride, norm=norm, attention=options
    )
    spread_norms(block)
    return block


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("in_channels", [32, 16])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "SyncBN", ""])
def test_a_block(norm, stride, in_channels, training):
    block = make_block(norm, stride, in_channels).train(training)
    reference = in_float64(block)
    x = torch.randn(2, in_channels, 9, 13, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    output = block(x)
    assert "Bottleneck" in output.grad_fn.name()
    assert_same(block, reference, [x], [exact], [output], [reference(exact)])
    with torch.no_grad():
        if not training:
            torch.testing.assert_close(block(x), output)


@pytest.mark.parametrize(
    "options",
    [
        {"content": False},
        {"position": "none"},
        {"border": "zero"},
        {"kernel_size": 3, "num_heads": 4},
    ],
    ids=str,
)
def test_kinds_of_attention(options):
    block = make_block(**options)
    reference = in_float64(block)
    x = torch.randn(1, 32, 7, 8, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    output = block(x)
    assert "Bottleneck" in output.grad_fn.name()
    assert_same(block, reference, [x], [exact], [output], [reference(exact)])


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics(momentum):
    block = make_block()
    for part in block.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = momentum
    reference = in_float64(block)
    for _ in range(3):
        x = torch.randn(2, 32, 5, 6)
        block(x)
        reference(x.double())
    for name, buffer in block.named_buffers():
        torch.testing.assert_close(
            buffer.double(), reference.get_buffer(name).double(), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("norm", ["BN", ""])
def test_towers_of_a_head(norm):
    torch.manual_seed(0)
    head = AttentionRetinaNetHead(
        input_shape=[ShapeSpec(channels=32, stride=8)] * 2,
        num_classes=3,
        num_anchors=2,
        conv_dims=[32, 16, 32],
        norm=norm,
        attention={"num_heads": 2},
    )
    for name, parameter in head.named_parameters():
        if "value" in name:
            parameter.data.mul_(20)
    spread_norms(head)
    reference = in_float64(head)
    inputs = [torch.randn(2, 32, 8, 9, requires_grad=True), torch.randn(2, 32, 4, 3)]
    inputs[1].requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    assert "Tower" in head.cls_subnet(inputs[0], 0).grad_fn.name()
    head.load_state_dict(reference.state_dict())  # one batch was seen
    outputs, expected = sum(head(inputs), []), sum(reference(exact), [])
    assert_same(head, reference, inputs, exact, outputs, expected)
    head.eval()
    with_gradients = sum(head(inputs), [])
    with torch.no_grad():
        for found, wanted in zip(sum(head(inputs), []), with_gradients, strict=True):
            torch.testing.assert_close(found, wanted)


def test_what_is_frozen_gets_no_gradient():
    block = make_block(in_channels=16)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_("conv1" not in name and "rel" not in name)
    block(torch.randn(1, 16, 6, 6)).sum().backward()
    for name, parameter in block.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name


def test_gradients_can_be_checkpointed_and_accumulate():
    block, x = make_block().eval(), torch.randn(1, 32, 6, 6, requires_grad=True)
    block(x).sum().backward()
    once = {name: p.grad.clone() for name, p in block.named_parameters()}
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name], msg=name)


HOOKS = {
    "conv1": lambda b: b.conv1,
    "norm of conv1": lambda b: b.conv1.norm,
    "attention": lambda b: b.attention,
    "query": lambda b: b.attention.query,
    "norm": lambda b: b.norm,
    "conv3": lambda b: b.conv3,
    "shortcut": lambda b: b.shortcut,
}


@pytest.mark.parametrize("part", HOOKS)
def test_hooks_of_every_part_run(part):
    block, calls = make_block(in_channels=16), []
    HOOKS[part](block).register_forward_hook(lambda *_: calls.append(part))
    block(torch.randn(1, 16, 6, 6))
    assert calls == [part]


def test_norms_that_are_more_than_a_scale_and_a_shift_are_called():
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    block = make_block()
    block.norm = Doubled(16)
    x = torch.randn(1, 32, 6, 6)
    assert fused.bottleneck(x, block) is None
    reference = in_float64(block)
    torch.testing.assert_close(block(x).double(), reference(x.double()), rtol=1e-4, atol=1e-5)


def test_a_single_value_is_refused_as_batch_norm_refuses_it():
    block = make_block(stride=2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(1, 32, 2, 2))


def test_no_images_are_no_block():
    """As in an R-CNN without proposals, where detectron2's layers take empty batches."""
    block, x = make_block().eval(), torch.randn(0, 32, 4, 4, requires_grad=True)
    assert fused.bottleneck(x, block) is None
    block(x).sum().backward()
    assert x.grad.shape == x.shape


def test_second_derivatives_are_refused():
    block, x = make_block(), torch.randn(1, 32, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        grad.sum().backward()


def test_the_backward_pass_needs_what_the_forward_pass_saw():
    block, x = make_block().eval(), torch.randn(2, 32, 6, 6)
    block(x).sum().backward()
    expected = block.norm.weight.grad.clone()
    block.zero_grad()
    output = block(x).sum()
    with torch.no_grad():
        block.norm.running_mean.add_(5)
    output.backward()
    torch.testing.assert_close(block.norm.weight.grad, expected)


@pytest.mark.parametrize("gradients", [True, False])
def test_biases_of_projections_count(gradients):
    """Without gradients in training mode as well, as when statistics are gathered anew."""
    block = make_block()
    block.attention.value = nn.Conv2d(16, 16, 1)
    nn.init.constant_(block.attention.value.bias, 3.0)
    reference = in_float64(block)
    x = torch.randn(2, 32, 6, 6)
    with torch.set_grad_enabled(gradients):
        output, expected = block(x), reference(x.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(block.norm.running_mean.double(), reference.norm.running_mean)


def test_strides_that_were_changed_are_not_left_out():
    block = make_block(stride=2, in_channels=16)
    block.attention.stride = 1
    block.shortcut.stride = (1, 1)
    assert fused.bottleneck(torch.randn(1, 16, 6, 6), block) is None
    assert block(torch.randn(1, 16, 6, 6)).shape == (1, 32, 6, 6)


def test_gradients_of_two_parameters_are_two_tensors():
    block = make_block(in_channels=16)
    grads = torch.autograd.grad(block(torch.randn(2, 16, 5, 5)).sum(), block.parameters())
    assert len({grad.data_ptr() for grad in grads}) == len(grads)


def test_nan_reaches_the_gradients():
    block, x = make_block(), torch.randn(1, 32, 5, 5)
    x[0, 0, 2, 2] = float("nan")
    block(x).sum().backward()
    assert block.conv1.norm.bias.grad.isnan().any() and block.norm.bias.grad.isnan().any()


def test_batches_that_are_not_counted():
    block = make_block()
    for part in block.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.num_batches_tracked = None
    before = block.norm.running_mean.clone()
    block(torch.randn(2, 32, 5, 5))
    assert not torch.equal(block.norm.running_mean, before)

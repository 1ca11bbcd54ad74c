"""The attention stem: its equations, its variants, its sizes, and its norms in training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2 import layers
from torch import nn

from sasa_det.layers import AttentionStem
from sasa_det.ops import cpu

needs_kernels = pytest.mark.skipif(cpu.MISSING is not None, reason=str(cpu.MISSING))


def test_mixing_is_equation_9():
    torch.manual_seed(0)
    stem = AttentionStem(num_mixtures=3)
    mixing = stem.mixing()
    assert mixing.shape == (3, 4, 4)
    for a in range(4):
        for b in range(4):
            place = stem.row_embedding[a] + stem.col_embedding[b]
            logits = torch.stack([place @ stem.mixture_embedding[m] for m in range(3)])
            torch.testing.assert_close(mixing[:, a, b], logits.softmax(0))


@pytest.mark.parametrize("num_mixtures,rows,cols", [(1, 1, 1), (2, 1, 2), (4, 2, 2), (16, 4, 4)])
def test_new_mixtures_have_a_cell_each_of_a_grid(num_mixtures, rows, cols):
    """Equation 9 at first: a softmax over minus the squared distances from the cells' centers."""
    torch.manual_seed(0)
    stem = AttentionStem(3, 16, 4, num_mixtures=num_mixtures)
    expected = torch.empty(num_mixtures, 4, 4)
    for a in range(4):
        for b in range(4):
            y, x = (a + 0.5) * rows / 4, (b + 0.5) * cols / 4  # in cells
            logits = [
                -6.0 * ((y - row - 0.5) ** 2 + (x - col - 0.5) ** 2)
                for row in range(rows)
                for col in range(cols)
            ]
            expected[:, a, b] = torch.tensor(logits).softmax(0)
    torch.testing.assert_close(stem.mixing(), expected, rtol=1e-4, atol=1e-5)


def test_heads_of_two_channels_tell_quadrants_apart():
    """Two directions of embeddings suffice, since all four centers are as far from the middle."""
    torch.manual_seed(0)
    narrow, wide = AttentionStem(3, 4, 2), AttentionStem(3, 16, 2)
    torch.testing.assert_close(narrow.mixing(), wide.mixing(), rtol=1e-4, atol=1e-5)


def test_a_new_stem_sees_edges_inside_a_block():
    """Blocks of the same mean color, split this way or that: their features differ by far."""
    torch.manual_seed(0)
    stem = AttentionStem(norm=None)
    halves = torch.ones(4, 4)
    halves[:, 2:] = -1.0
    upright, lying, flat = (
        stem(pattern.expand(1, 3, 4, 4)).flatten() for pattern in (halves, halves.T, 0 * halves)
    )
    assert (upright - lying).norm() > 0.5 * upright.norm()
    assert flat.norm() == 0


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("values", ["mixture", "pointwise", "convolution"])
def test_equals_its_equations_on_one_block(values, relative):
    torch.manual_seed(0)
    stem = AttentionStem(3, 8, 2, values=values, relative=relative, norm=None).double()
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)

    def pointwise(layer, pixel):
        return layer.weight[:, :, 0, 0] @ pixel

    places = [(a, b) for a in range(4) for b in range(4)]
    value = {}
    for a, b in places:
        pixel = x[0, :, a, b]
        if values == "mixture":
            mixing = stem.mixing()[:, a, b]
            value[a, b] = torch.einsum("m,mci->ci", mixing, stem.value_weight) @ pixel
        elif values == "pointwise":
            value[a, b] = pointwise(stem.value, pixel)
        else:
            # A 4x4 window that starts one pixel up and left.
            padded = F.pad(x[0], (1, 2, 1, 2))[:, a : a + 4, b : b + 4]
            value[a, b] = torch.einsum("oiab,iab->o", stem.value.weight, padded)
    output = torch.zeros(8, 4, 4, dtype=torch.float64)
    for i, j in places:
        query = pointwise(stem.query, x[0, :, i, j])
        for head in (0, 1):
            channels = slice(4 * head, 4 * head + 4)
            logits = []
            for a, b in places:
                key = pointwise(stem.key, x[0, :, a, b])[channels]
                if relative:
                    row = stem.rel_rows[head, :, a - i + 3]
                    key = key + torch.cat([row, stem.rel_cols[head, :, b - j + 3]])
                logits.append(query[channels] @ key)
            weights = torch.stack(logits).softmax(0)
            for weight, place in zip(weights, places, strict=True):
                output[channels, i, j] += weight * value[place][channels]
    expected = output.relu().amax((1, 2))
    torch.testing.assert_close(stem(x)[0, :, 0, 0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (5, 7), (8, 12), (9, 30)])
def test_any_size_rounds_up_to_blocks(size):
    stem = AttentionStem(3, 8, 2)
    output = stem(torch.randn(2, 3, *size))
    assert output.shape == (2, 8, -(-size[0] // 4), -(-size[1] // 4))


def test_blocks_are_independent():
    torch.manual_seed(0)
    stem = AttentionStem(3, 8, 2).eval()
    x = torch.randn(1, 3, 10, 11)
    whole = stem(x)
    torch.testing.assert_close(whole[..., 1:2, 1:2], stem(x[..., 4:8, 4:8]))
    # What lies outside the image takes no part in the last, cut block.
    torch.testing.assert_close(whole[..., 2:, 2:], stem(x[..., 8:, 8:]))


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that never trains, by the name that detectron2 and torchvision give theirs."""

    def train(self, mode=True):
        return super().train(False)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, FrozenBatchNorm2d, None, lambda c: nn.GroupNorm(2, c)]
)
@pytest.mark.parametrize("values", ["mixture", "pointwise", "convolution"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
def test_the_output_is_the_same_without_gradients(training, dtype, values, norm):
    torch.manual_seed(0)
    stem = AttentionStem(3, 8, 2, values=values, norm=norm).to(dtype)
    for name, buffer in stem.norm.named_buffers():
        if name != "num_batches_tracked":
            buffer.uniform_(0.5, 2.0)
    for parameter in stem.norm.parameters():
        nn.init.normal_(parameter)
    stem.train(training)
    x = torch.randn(2, 3, 10, 13, dtype=dtype)
    expected = stem(x)
    with torch.no_grad():
        torch.testing.assert_close(stem(x), expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("values", ["mixture", "pointwise", "convolution"])
@pytest.mark.parametrize("gradients", [True, False])
def test_autocast(gradients, values):
    torch.manual_seed(0)
    stem = AttentionStem(3, 8, 2, values=values).eval()
    x = torch.randn(1, 3, 9, 14)
    expected = stem(x)
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", dtype=torch.bfloat16):
        actual = stem(x)
    torch.testing.assert_close(actual.float(), expected, rtol=5e-2, atol=5e-2)
    if gradients:
        actual.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in stem.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "values,norm", [("mixture", None), ("mixture", nn.BatchNorm2d), ("convolution", None)]
)
def test_compiles(values, norm):
    torch.manual_seed(0)
    stem = AttentionStem(3, 8, 2, values=values, norm=norm)
    compiled = copy.deepcopy(stem)
    x = torch.randn(2, 3, 8, 12)
    results = []
    for module, run in ((stem, stem), (compiled, torch.compile(compiled, fullgraph=True))):
        grads = torch.autograd.grad(run(x).square().sum(), module.parameters())
        results.append([*grads, *module.buffers()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def no_tracking(channels):
    return nn.BatchNorm2d(channels, track_running_stats=False)


NORMS = {
    "batch norm": nn.BatchNorm2d,
    "evaluated": lambda c: nn.BatchNorm2d(c).eval(),
    "without weights": lambda c: nn.BatchNorm2d(c, affine=False),
    "evaluated without weights": lambda c: nn.BatchNorm2d(c, affine=False).eval(),
    "cumulative average": lambda c: nn.BatchNorm2d(c, momentum=None),
    "all of the average": lambda c: nn.BatchNorm2d(c, momentum=1.0),
    "large epsilon": lambda c: nn.BatchNorm2d(c, eps=0.5),
    "no tracking": no_tracking,
    "evaluated without tracking": lambda c: no_tracking(c).eval(),
    "of one process": nn.SyncBatchNorm,
    "frozen": layers.FrozenBatchNorm2d,
    "groups": lambda c: nn.GroupNorm(2, c),
    "none": None,
}


@pytest.mark.parametrize("values", ["mixture", "pointwise"])
@pytest.mark.parametrize("norm", NORMS)
def test_training_equals_layer_after_layer(norm, values):
    """Outputs, gradients and running statistics of two steps, against calls in double precision."""
    torch.manual_seed(0)
    stem = AttentionStem(3, 12, 2, values=values, norm=NORMS[norm])
    for parameter in stem.norm.parameters():
        nn.init.normal_(parameter)
        parameter.data[5] = 0.0
    for name, buffer in stem.norm.named_buffers():
        if name != "num_batches_tracked":
            buffer.uniform_(0.5, 2.0)
    exact = copy.deepcopy(stem).double()
    for size in ((2, 3, 14, 25), (1, 3, 33, 7)):
        x = torch.randn(size)
        inputs = x.clone().requires_grad_(), x.double().requires_grad_()
        output, expected = stem(inputs[0]), exact(inputs[1])
        torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
        # Where rounding does not choose between on and off.
        grad = torch.randn_like(output) * (expected > 1e-3)
        grads = [
            torch.autograd.grad(y, [x, *module.parameters()], grad.to(y.dtype))
            for y, x, module in zip((output, expected), inputs, (stem, exact), strict=True)
        ]
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(stem.buffers(), exact.buffers(), strict=True):
            torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("norm", sorted(set(NORMS) - {"groups"}))
def test_training_saves_no_map_of_the_image_size(norm):
    stem = AttentionStem(3, 12, 2, norm=NORMS[norm])
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stem(torch.randn(1, 3, 80, 80))
    assert max(sizes) == 3 * 80 * 80  # the image


def test_one_value_per_channel_is_refused_by_the_norm():
    stem = AttentionStem(3, 8, 2)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as error:
        stem(torch.randn(1, 3, 1, 1))
    callers = [entry.frame.f_locals.get("self") for entry in error.traceback]
    assert stem.norm in callers


def test_a_norm_that_shares_statistics_is_called():
    """PyTorch's has no CPU kernels, and says so where there are processes to share with."""
    stem = AttentionStem(3, 8, 2, norm=nn.SyncBatchNorm)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="SyncBatchNorm expected"):
            stem(torch.randn(1, 3, 8, 8))
    finally:
        torch.distributed.destroy_process_group()


def test_an_empty_batch_trains():
    stem = AttentionStem(3, 8, 2)
    output = stem(torch.randn(0, 3, 8, 9))
    assert output.shape == (0, 8, 2, 3)
    output.sum().backward()


@needs_kernels
def test_a_stem_that_does_not_train_keeps_nothing_for_it():
    stem = AttentionStem(3, 8, 2, norm=layers.FrozenBatchNorm2d).requires_grad_(False)
    x = torch.randn(1, 3, 9, 10)
    output = stem(x)
    assert not output.requires_grad
    with torch.no_grad():
        assert torch.equal(output, stem(x))


def test_every_parameter_learns():
    torch.manual_seed(0)
    stem = AttentionStem(3, 8, 2)
    (stem(torch.randn(2, 3, 9, 9)) * torch.randn(2, 8, 3, 3)).sum().backward()
    for name, parameter in stem.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "options,message",
    [
        ({"values": "conv"}, "values must be one of .*, got 'conv'"),
        ({"num_heads": 5}, "out_channels 64 must be a multiple of num_heads 5"),
        ({"num_mixtures": 0}, "num_mixtures must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionStem(**options)

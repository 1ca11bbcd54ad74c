"""Pairwise and patchwise attention: their equations, borders, positions and precision."""

import pytest
import torch

from sasa_det.layers import PairwiseAttention2d, PatchwiseAttention2d
from sasa_det.layers.vector_attention import PAIRWISE_RELATIONS, PATCHWISE_RELATIONS

LAYERS = [
    *((PairwiseAttention2d, relation) for relation in PAIRWISE_RELATIONS),
    *((PatchwiseAttention2d, relation) for relation in PATCHWISE_RELATIONS),
]
PAIRWISE = {
    "subtraction": lambda query, key: query - key,
    "summation": lambda query, key: query + key,
    "concatenation": lambda query, key: torch.cat([query, key]),
    "hadamard_product": lambda query, key: query * key,
    "dot_product": lambda query, key: (query @ key)[None],
}
PATCHWISE = {
    # Channel by channel, and in each the places of the window row by row.
    "concatenation": lambda query, queries, keys: torch.cat(
        [query, torch.stack([key[c] for c in range(len(query)) for key in keys])]
    ),
    "star_product": lambda query, queries, keys: torch.stack([query @ key for key in keys]),
    "clique_product": lambda query, queries, keys: torch.stack(
        [query @ key for query in queries for key in keys]
    ),
}
SMALL = {"relation_channels": 3, "share_channels": 2, "kernel_size": 3}


def make_layer(kind, **options):
    """Make a layer in float64 whose batch norms do something."""
    torch.manual_seed(0)
    layer = kind(5, 8, **{**SMALL, **options}).double().eval()
    for module in layer.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 2)
            for tensor in (module.bias.data, module.running_mean):
                tensor.normal_()
    return layer


def gamma(layer, features):
    """Map a vector by norm, ReLU and linear layer, twice."""
    for norm, _, linear in (layer.weights[:3], layer.weights[3:]):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        features = ((features - norm.running_mean) * scale + norm.bias).clamp(min=0)
        features = linear.weight[:, :, 0, 0] @ features
        if linear.bias is not None:
            features = features + linear.bias
    return features


def bounce(index, size):
    while size > 1 and not 0 <= index < size:
        index = -index if index < 0 else 2 * (size - 1) - index
    return index if size > 1 else 0


def literal(layer, image):
    """Compute the layer pixel by pixel and neighbour by neighbour."""
    _, height, width = image.shape

    def linear(projection, pixel):
        return projection.weight[:, :, 0, 0] @ image[(slice(None), *pixel)] + projection.bias

    def place(pixel):
        row, col = pixel
        x = 2 * col / (width - 1) - 1 if width > 1 else -1.0
        y = 2 * row / (height - 1) - 1 if height > 1 else -1.0
        grid = torch.tensor([x, y], dtype=image.dtype)
        return layer.position.weight[:, :, 0, 0] @ grid + layer.position.bias

    output = torch.zeros(8, height, width, dtype=image.dtype)
    half = layer.kernel_size // 2
    offsets = [(r, c) for r in range(-half, half + 1) for c in range(-half, half + 1)]
    for row in range(height):
        for col in range(width):
            window = [(bounce(row + r, height), bounce(col + c, width)) for r, c in offsets]
            query = linear(layer.query, (row, col))
            keys = [linear(layer.key, pixel) for pixel in window]
            if isinstance(layer, PairwiseAttention2d):
                logits = []
                for key, pixel in zip(keys, window, strict=True):
                    position = place((row, col)) - place(pixel)
                    relation = torch.cat([PAIRWISE[layer.relation](query, key), position])
                    logits.append(gamma(layer, relation))
                weights = torch.stack(logits).softmax(0)
            else:
                queries = [linear(layer.query, pixel) for pixel in window]
                weights = gamma(layer, PATCHWISE[layer.relation](query, queries, keys))
                # All places of the first group, then of the second.
                weights = weights.reshape(4, len(window)).T
            for weight, pixel in zip(weights, window, strict=True):
                value = linear(layer.value, pixel)
                for channel in range(8):
                    output[channel, row, col] += weight[channel % 4] * value[channel]
    return output


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 5), (1, 2), (1, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("kind,relation", LAYERS)
def test_equals_a_literal_loop(kind, relation, size):
    layer = make_layer(kind, relation=relation)
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    expected = torch.stack([literal(layer, image) for image in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    # Where there are C++ kernels, they take float32.
    torch.testing.assert_close(layer.float()(x.float()), expected.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind,relation", LAYERS)
def test_gradients(kind, relation, training):
    layer = make_layer(kind, relation=relation).train(training)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, 5, 3, 2, dtype=torch.float64, requires_grad=True)

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)
    run(x, *parameters).square().sum().backward()
    # Processes that train together need a gradient of every parameter.
    assert all(parameter.grad is not None for parameter in parameters)


@pytest.mark.parametrize(
    "kind,features,weights",
    [
        (PairwiseAttention2d, 16 + 2, {"2": (16, 18, 1, 1), "5": (8, 16, 1, 1)}),
        (PatchwiseAttention2d, 16 * 50, {"2": (8, 800, 1, 1), "5": (392, 8, 1, 1)}),
    ],
)
def test_shapes_of_the_published_layers(kind, features, weights):
    state = {name: tuple(x.shape) for name, x in kind(256, 64).state_dict().items()}
    assert state["query.weight"] == state["key.weight"] == (16, 256, 1, 1)
    assert state["value.weight"] == (64, 256, 1, 1)
    assert state["query.bias"] == state["key.bias"] == (16,)
    assert state["weights.0.running_mean"] == (features,)
    assert state["weights.3.weight"] == weights["2"][:1]
    for index, shape in weights.items():
        assert state[f"weights.{index}.weight"] == shape
    assert "weights.2.bias" not in state
    assert state["weights.5.bias"] == weights["5"][:1]
    position = {name: shape for name, shape in state.items() if name.startswith("position")}
    pairwise = kind is PairwiseAttention2d
    assert position == (
        {"position.weight": (2, 2, 1, 1), "position.bias": (2,)} if pairwise else {}
    )


@torch.no_grad()
@pytest.mark.parametrize("kind,relation", LAYERS)
def test_borders_are_reflected(kind, relation):
    layer = make_layer(kind, relation=relation)
    if kind is PairwiseAttention2d:
        # A reflected pixel keeps its place.
        layer.position.weight.zero_()
    a, b, c, d, e, f = torch.randn(6, 5, dtype=torch.float64)
    image = torch.stack([a, b, c, d, e, f]).reshape(2, 3, 5)
    by_hand = torch.stack([e, d, e, f, e, b, a, b, c, b, e, d, e, f, e, b, a, b, c, b])
    image, by_hand = (x.permute(2, 0, 1)[None] for x in (image, by_hand.reshape(4, 5, 5)))
    torch.testing.assert_close(layer(image), layer(by_hand)[..., 1:3, 1:4])


@torch.no_grad()
@pytest.mark.parametrize("kind", [PairwiseAttention2d, PatchwiseAttention2d])
def test_images_smaller_than_the_window(kind):
    layer = make_layer(kind, kernel_size=7)
    for size in [(3, 3), (2, 8), (5, 1)]:
        output = layer(torch.randn(2, 5, *size, dtype=torch.float64))
        assert output.shape == (2, 8, *size)
        assert output.isfinite().all()
    # All of the window is the one pixel, and pairwise weights sum to 1.
    pixel = torch.randn(1, 5, 1, 1, dtype=torch.float64)
    weights = layer.window_weights(layer.query(pixel), layer.key(pixel)).sum(2)
    torch.testing.assert_close(layer(pixel), weights.repeat(1, 2, 1, 1) * layer.value(pixel))
    if kind is PairwiseAttention2d:
        torch.testing.assert_close(weights, torch.ones_like(weights))


@torch.no_grad()
def test_positions_of_a_fixed_size():
    published = make_layer(PairwiseAttention2d)
    fixed = make_layer(PairwiseAttention2d, position_size=9)
    x = torch.randn(1, 5, 9, 14, dtype=torch.float64)
    square = x[..., :9]
    torch.testing.assert_close(fixed(square), published(square))
    # What a pixel sees is no matter of the image's size.
    inner = (..., slice(1, 8), slice(1, 8))
    torch.testing.assert_close(fixed(x)[inner], fixed(square)[inner])
    assert (published(x)[inner] - published(square)[inner]).abs().max() > 1e-4
    # Twice the size, half the step.
    double = make_layer(PairwiseAttention2d, position_size=17)
    double.position.weight *= 2
    torch.testing.assert_close(double(x), fixed(x))


@pytest.mark.parametrize("kind", [PairwiseAttention2d, PatchwiseAttention2d])
def test_autocast(kind):
    torch.manual_seed(0)
    layer = kind(16, 32, norm=None)
    x = torch.randn(1, 16, 5, 9)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = layer(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=5e-2, atol=5e-2)
    actual.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_half_precision_tells_the_positions_of_neighbours_apart():
    layer = PairwiseAttention2d(4, 8)
    exact = layer._relative_positions(3, 1000, torch.zeros(0))
    rounded = layer._relative_positions(3, 1000, torch.zeros(0, dtype=torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize(
    "kind,options,message",
    [
        (PairwiseAttention2d, {"kernel_size": 4}, "kernel_size must be odd and at least 1, got 4"),
        (PairwiseAttention2d, {"relation": "star_product"}, "relation must be .*'dot_product'"),
        (PatchwiseAttention2d, {"relation": "subtraction"}, "relation must be one of .*'clique_pr"),
        (PatchwiseAttention2d, {"share_channels": 3}, "out_channels 8 must be a multiple .* 3"),
        (PatchwiseAttention2d, {"relation_channels": 0}, "relation_channels must be at least 1"),
        (PairwiseAttention2d, {"position_size": 1}, "position_size must be 0 or at least 2, got 1"),
    ],
)  # fmt: skip
def test_bad_values_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(5, 8, **{**SMALL, **options})

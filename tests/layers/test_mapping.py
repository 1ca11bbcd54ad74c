"""Weights of vector attention without stored relations, beside all relations at once."""

import copy
import logging

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d

from sasa_det.layers import (
    PairwiseAttention2d,
    PatchwiseAttention2d,
    mapping,
    pointwise_mapping,
)
from sasa_det.layers.vector_attention import PAIRWISE_RELATIONS, PATCHWISE_RELATIONS
from sasa_det.ops import aggregate
from tests.ops.test_aggregation import LargestTensor

LAYERS = [
    *((PairwiseAttention2d, relation) for relation in PAIRWISE_RELATIONS),
    *((PatchwiseAttention2d, relation) for relation in PATCHWISE_RELATIONS),
]


def make_layer(kind, relation, dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {"relation_channels": 3, "share_channels": 2, "kernel_size": 3, **options}
    layer = kind(5, 8, relation=relation, **options).to(dtype)
    for name, parameter in layer.named_parameters():
        if name.endswith("bias") or "weights.0" in name or "weights.3" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return layer


def results(layer, x, at_once):
    """Return the weights, all gradients, and the buffers behind two steps."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    for _ in range(2):
        query, key = layer.query(x), layer.key(x)
        weights = (
            layer.window_weights(query, key) if at_once else layer.mapping(query, key).weights()
        )
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(weights.shape, dtype=torch.float64, generator=generator).to(x.dtype)
    weights.backward(grad)
    parameters = [*layer.query.named_parameters(), *layer.key.named_parameters()]
    parameters += [(name, p) for name, p in layer.named_parameters() if "value" not in name]
    found = {"weights": weights.detach(), "x": x.grad}
    found.update((name, p.grad) for name, p in parameters)
    return {**found, **dict(layer.named_buffers())}


@pytest.fixture
def small_bands(monkeypatch):
    monkeypatch.setattr(mapping, "NUMBERS_OF_BAND", 2 * 9 * 5 * 5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(7, 6), (5, 1), (1, 2)])
@pytest.mark.parametrize("kind,relation", LAYERS)
def test_equals_all_relations_at_once(kind, relation, size, training, small_bands):
    layer = make_layer(kind, relation).train(training)
    x = 2 + torch.randn(2, 5, *size, dtype=torch.float64)
    expected = results(layer, x, at_once=True)
    actual = results(layer, x, at_once=False)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-10, msg=name)
    if training:
        assert actual["weights.0.num_batches_tracked"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind,relation", LAYERS)
def test_weights_that_are_made_again(kind, relation, dtype, small_bands, monkeypatch):
    monkeypatch.setattr(mapping, "MOST_KEPT_WEIGHTS", 0)
    layer, x = make_layer(kind, relation), torch.randn(2, 5, 7, 6, dtype=torch.float64)
    exact, x_exact = copy.deepcopy(layer), x.clone().requires_grad_()
    query, key, value = exact.query(x_exact), exact.key(x_exact), exact.value(x_exact)
    weights = exact.window_weights(query, key)
    expected = aggregate(value, weights, kernel_size=3)
    layer, x = layer.to(dtype), x.to(dtype).requires_grad_()
    output = layer(x)
    grad = torch.randn(output.shape, dtype=torch.float64)
    output.backward(grad.to(dtype))
    expected.backward(grad)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-3
    found = {"output": output, "x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}
    exact = {n: p.grad for n, p in exact.named_parameters()}
    for name, value in {"output": expected, "x": x_exact.grad, **exact}.items():
        torch.testing.assert_close(
            found[name].double(), value, rtol=tolerance, atol=tolerance, msg=name
        )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 3, 4])  # at a time, of 4
@pytest.mark.parametrize("relation", PATCHWISE_RELATIONS)
def test_weights_of_some_groups_at_a_time(relation, groups, bias, monkeypatch):
    monkeypatch.setattr(mapping, "MOST_KEPT_WEIGHTS", 0)
    monkeypatch.setattr(pointwise_mapping, "NUMBERS_OF_PART", groups * 2 * 7 * 6 * 9)
    make_weights, seen = pointwise_mapping._Parts.weights, []

    def weights_of_part(*arguments):
        weights = make_weights(*arguments)
        seen.append(weights.shape[1])
        return weights

    monkeypatch.setattr(pointwise_mapping._Parts, "weights", weights_of_part)
    layer = make_layer(PatchwiseAttention2d, relation, torch.float32).eval()
    if not bias:
        layer.weights[5].bias = None
    exact, x = copy.deepcopy(layer).double(), torch.randn(2, 5, 7, 6).requires_grad_()
    x_exact = x.detach().double().requires_grad_()
    query, key, value = exact.query(x_exact), exact.key(x_exact), exact.value(x_exact)
    expected = aggregate(value, exact.window_weights(query, key), kernel_size=3)
    output = layer(x)
    grad = torch.randn_like(output)
    output.backward(grad)
    assert seen == 2 * {1: [1, 1, 1, 1], 3: [3, 1], 4: [4]}[groups]  # forward and backward
    expected.backward(grad.double())
    with torch.no_grad():
        assert torch.equal(layer(x), output)
    found = {"output": output, "x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}
    exact = {n: p.grad for n, p in exact.named_parameters()}
    for name, value in {"output": expected, "x": x_exact.grad, **exact}.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize(
    "norm",
    [
        None,
        FrozenBatchNorm2d,
        torch.nn.SyncBatchNorm,  # of a single process
        lambda channels: torch.nn.BatchNorm2d(channels, momentum=None),
        lambda channels: torch.nn.BatchNorm2d(channels, affine=False, track_running_stats=False),
    ],
)
@pytest.mark.parametrize("kind", [PairwiseAttention2d, PatchwiseAttention2d])
def test_norms(kind, norm, small_bands):
    layer = make_layer(kind, None, norm=norm)
    if norm is torch.nn.SyncBatchNorm:  # whose own forward takes no CPU tensors
        plain = make_layer(kind, None)
        plain.load_state_dict(layer.state_dict())
    else:
        plain = layer
    x = torch.randn(2, 5, 6, 5, dtype=torch.float64)
    expected = results(plain, x, at_once=True)
    actual = results(layer, x, at_once=False)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("kind,relation", LAYERS)
def test_float32_equals_float64(kind, relation):
    layer = make_layer(kind, relation)
    # Far from zero, where differences of sums lose digits.
    x = 30 + torch.randn(1, 5, 9, 20, dtype=torch.float64)
    expected = results(layer, x, at_once=True)
    actual = results(layer.float(), x.float(), at_once=False)
    for name in ("weights", "weights.0.running_var", "weights.3.running_mean", "x"):
        torch.testing.assert_close(
            actual[name].double(), expected[name], rtol=5e-3, atol=5e-3, msg=name
        )


@pytest.mark.parametrize("kind,relation", LAYERS)
def test_relations_are_never_all_there(kind, relation, monkeypatch):
    monkeypatch.setattr(mapping, "NUMBERS_OF_BAND", 1)
    layer = kind(8, 8, relation=relation, relation_channels=8, share_channels=4)
    x = torch.randn(1, 8, 30, 10, requires_grad=True)
    with LargestTensor() as largest:
        layer(x).sum().backward()
    # The weights themselves, of which there are two groups.
    assert 0 < largest.elements <= 2 * 49 * 30 * 10


@pytest.mark.parametrize("kind", [PairwiseAttention2d, PatchwiseAttention2d])
@pytest.mark.parametrize("change", ["hook", "norm", "trace"])
def test_other_layers_run_as_they_stand(kind, change, caplog):
    layer = make_layer(kind, None).eval()
    x = torch.randn(1, 5, 4, 4, dtype=torch.float64)
    expected, seen = layer(x), []
    mapping.say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="sasa_det"):
        if change == "hook":
            layer.weights[2].register_forward_hook(lambda *arguments: seen.append(1))
            actual, reason = layer(x), "a layer of it was replaced or hooked"
        elif change == "norm":
            channels = layer.weights[0].num_features
            layer.weights[0] = torch.nn.GroupNorm(1, channels).double()
            actual, reason = layer(x), "its norm, GroupNorm, is not known"
            expected = layer.window_weights(layer.query(x), layer.key(x))
            expected = sum_of_windows(layer, x, expected)
        else:
            actual, reason = torch.jit.trace(layer, x)(x), "a trace or program is made"
    assert reason in caplog.text
    assert seen == ([1] if change == "hook" else [])
    torch.testing.assert_close(actual, expected)


def sum_of_windows(layer, x, weights):
    windows = layer._windows(layer.value(x)).unflatten(3, x.shape[2:]).unflatten(1, (-1, 4))
    return (weights[:, None] * windows).sum(3).flatten(1, 2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "kind,relation",
    [
        (PairwiseAttention2d, "subtraction"),
        (PairwiseAttention2d, "dot_product"),
        (PatchwiseAttention2d, "concatenation"),
        (PatchwiseAttention2d, "clique_product"),
    ],
)
def test_a_compiled_layer(kind, relation, training):
    torch.compiler.reset()
    layer = make_layer(kind, relation, torch.float32).train(training)
    twin, x = copy.deepcopy(layer), torch.randn(2, 5, 7, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [compiled(inputs[0]), twin(inputs[1])]
    grad = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(grad)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-3)
    for (name, p), other in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad, rtol=2e-3, atol=2e-3, msg=name)

"""Detectors with norms of queries and keys run wherever those without do."""

import pytest
import torch
from detectron2.layers import CycleBatchNormList
from torch import nn

from sasa_det.analysis.attention_maps import attention_maps
from sasa_det.analysis.complexity import count_config, total
from sasa_det.engine import Trainer, load_config
from sasa_det.layers import LocalSelfAttention2d
from sasa_det.modeling import fuse
from sasa_det.ops import attention_weights

NORMS = ["BN", "RMS", "cosine"]


def config(qk_norm):
    opts = ["MODEL.SASA.QK_NORM", qk_norm, "MODEL.SASA.SCALE_LOGITS", "True"]
    return load_config("configs/Quick/retinanet_SASA.yaml", ["MODEL.DEVICE", "cpu", *opts])


def build(qk_norm):
    """Build a detector whose norms have statistics, scales and shifts that matter."""
    torch.manual_seed(0)
    model = Trainer.build_model(config(qk_norm)).eval()
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
        for name in ("query_norm", "key_norm"):
            norm = getattr(module, name, None)
            for parameter in () if norm is None else norm.parameters():
                parameter.data += 0.3 * torch.rand_like(parameter)
    return model


def outputs(model, images):
    features = model.backbone(images)
    heads = model.head([features[name] for name in model.head_in_features])
    return [*features.values(), *(x for level in heads for x in level)]


def assert_close(found, expected, tolerance=1e-5):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.float() - other).abs().max() <= tolerance * other.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", NORMS)
def test_fused_and_channels_last_models_compute_the_same(qk_norm):
    model = build(qk_norm)
    layers = [m for m in model.modules() if isinstance(m, LocalSelfAttention2d)]
    assert len(layers) > 5 and all(layer.qk_norm == qk_norm for layer in layers)
    images = torch.randn(1, 3, 64, 96)
    expected = outputs(model, images)
    fused = fuse(model)
    assert_close(outputs(fused, images), expected, 2e-5)
    norms = [
        norm
        for name, m in fused.backbone.named_modules()
        if isinstance(m, LocalSelfAttention2d)
        for norm in (m.query_norm, m.key_norm)
    ]
    assert all((norm is None) == (qk_norm == "BN") for norm in norms)
    last = images.to(memory_format=torch.channels_last)
    assert_close(outputs(model.to(memory_format=torch.channels_last), last), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(outputs(model, images), expected, 0.2)


def test_levels_have_batch_norms_of_their_own():
    model = build("BN")
    attention = model.head.cls_subnet[0]["attention"]
    norm = attention.query_norm
    assert isinstance(norm, CycleBatchNormList) and len(norm) == len(model.head_in_features)
    # The constant of the queries is its shift, as in a layer that serves one level.
    length = norm.bias.new_tensor(2.0).sqrt()
    fresh = Trainer.build_model(config("BN")).head.cls_subnet[0]["attention"].query_norm
    heads = fresh.bias.unflatten(0, (attention.num_heads, -1)) * attention.logit_factor
    torch.testing.assert_close(heads.norm(dim=1), length.expand(attention.num_heads))
    features = [torch.randn(1, norm[0].num_features, 5, 5) + i for i in range(len(norm))]
    before = [part.running_mean.clone() for part in norm]
    model.head.train()(features)
    for i, part in enumerate(norm):
        mean = attention.query(features[i]).mean((0, 2, 3))
        torch.testing.assert_close(part.running_mean, 0.9 * before[i] + 0.1 * mean)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", NORMS)
def test_attention_is_drawn_with_the_norms_of_the_level(qk_norm):
    model = build(qk_norm).train()  # it is drawn in eval mode
    state = {name: value.clone() for name, value in model.state_dict().items()}
    image = torch.rand(3, 64, 64) * 255
    level = model.head_in_features[1]
    maps = attention_maps(model, image, f"head.cls.0@{level}", (20, 20))
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in state.items())
    model.eval()
    attention, seen = model.head.cls_subnet[0]["attention"], []
    handles = [
        norm.register_forward_hook(lambda _, __, output: seen.append(output))
        for norm in (attention.query_norm, attention.key_norm)
    ]
    model([{"image": image}])
    for handle in handles:
        handle.remove()
    query, key = seen[2:4]  # the second level's
    weights = attention_weights(
        query.double() * attention.logit_factor, key.double(),
        attention.rel_rows.double(), attention.rel_cols.double(),
        kernel_size=attention.kernel_size, num_heads=attention.num_heads,
    )  # fmt: skip
    torch.testing.assert_close(
        maps.weights, weights[0][..., maps.pixel[0], maps.pixel[1]], rtol=1e-4, atol=1e-5
    )


def test_norms_cost_parameters_and_no_flops():
    plain, cosine = (total(count_config(config(norm), 64, 64)) for norm in ("", "cosine"))
    layers = [m for m in build("cosine").modules() if isinstance(m, LocalSelfAttention2d)]
    assert cosine.flops == plain.flops > 0
    assert cosine.parameters - plain.parameters == sum(layer.num_heads for layer in layers)


def test_a_frozen_stage_has_no_running_statistics():
    block = build("BN").backbone.bottom_up.res2[0]
    block.freeze()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in block.modules())
    assert not any(p.requires_grad for p in block.attention.parameters())

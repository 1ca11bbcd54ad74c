"""Attention maps of whole models beside literal sums over the queries and keys of their layers."""

import math

import pytest
import torch
from detectron2.modeling import build_model

from sasa_det.analysis.attention_figure import draw_attention
from sasa_det.analysis.attention_maps import attention_layers, attention_maps
from sasa_det.config.load import load_config
from sasa_det.errors import UsageError

CONFIG = "configs/Quick/retinanet_SASA.yaml"


def make_model(*opts):
    torch.manual_seed(0)
    return build_model(load_config(CONFIG, ["MODEL.DEVICE", "cpu", *opts]))


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def image():
    return torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.manual_seed(1))


def inputs_of(module, model, image):
    """What a module is called with on an image, call by call."""
    inputs = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model.eval()([{"image": image}])
    handle.remove()
    return inputs


def literal_windows(module, x):
    """Equation 3 in float64 for all pixels, by neighbour: (height, width, heads, k, k)."""
    with torch.no_grad():
        query, key = module.query(x)[0].double(), module.key(x)[0].double()
    heads, side = module.num_heads, module.kernel_size
    rows, cols = module.rel_rows.detach().double(), module.rel_cols.detach().double()
    height, width = x.shape[2:]
    windows = torch.zeros(height, width, heads, side, side, dtype=torch.float64)
    for y in range(height):
        for x_ in range(width):
            q = query[:, y, x_].view(heads, -1)
            terms = {}
            for i in range(side):
                for j in range(side):
                    v, u = y + i - side // 2, x_ + j - side // 2
                    inside = 0 <= v < height and 0 <= u < width
                    if not inside and module.border == "mask":
                        continue
                    k = key[:, v, u].view(heads, -1) if inside else torch.zeros_like(q)
                    r = torch.cat([rows[:, :, i], cols[:, :, j]], 1)
                    terms[i, j] = (q * (k + r)).sum(1).exp()
            total = sum(terms.values())
            for (i, j), term in terms.items():
                windows[y, x_, :, i, j] = term / total
    return windows


@pytest.mark.parametrize("border", ["mask", "zero"])
def test_they_are_equation_3_and_its_mean(border, image):
    model = make_model("MODEL.SASA.BORDER", border)
    layers = {
        "res3.0": (model.backbone.bottom_up.res3[0].attention, 0, 4),
        "fpn.output3": (model.backbone.fpn_output3.attention, 0, 8),
        "fpn.p6": (model.backbone.top_block.p6, 0, 32),
        "head.cls.0@p4": (model.head.cls_subnet[0]["attention"], 1, 16),
        "head.bbox_pred@p3": (model.head.bbox_pred[0], 0, 8),
    }
    for name, (module, call, stride) in layers.items():
        x = inputs_of(module, model, image)[call]
        expected = literal_windows(module, x)
        maps = attention_maps(model, image, name, (70, 33))
        row, column = 33 // stride, 70 // stride
        assert maps.pixel == (row, column) and maps.cell == (stride, stride), name
        assert maps.map_size == x.shape[2:], name
        torch.testing.assert_close(maps.weights, expected[row, column], rtol=0, atol=1e-6)
        torch.testing.assert_close(maps.mean, expected.mean((0, 1)), rtol=0, atol=1e-6)
        for weights in (maps.weights, maps.mean):
            ones = torch.ones(maps.num_heads, dtype=torch.float64)
            torch.testing.assert_close(weights.sum((1, 2)), ones, rtol=0, atol=1e-12)


def test_the_stem_looks_at_its_blocks(model, image):
    maps = attention_maps(model, image, "stem", (70, 33))
    stem = model.backbone.bottom_up.stem
    assert maps.pixel == (33, 70) and maps.cell == (1, 1) and maps.is_block
    assert maps.kernel_size == 7
    torch.testing.assert_close(maps.mixing, stem.mixing().detach().double())
    # Row 33 is the second of its block, column 70 the third.
    block = maps.weights[:, 3 - 1 : 3 + 3, 3 - 2 : 3 + 2]
    ones = torch.ones(maps.num_heads, dtype=torch.float64)
    torch.testing.assert_close(block.sum((1, 2)), ones, rtol=0, atol=1e-12)
    assert (block > 0).all()
    (x,) = inputs_of(stem, model, image)
    with torch.no_grad():
        query, key = stem.query(x)[0].double(), stem.key(x)[0].double()
    q = query[:, 33, 70].view(maps.num_heads, -1)
    logits = torch.zeros(maps.num_heads, 4, 4, dtype=torch.float64)
    for a in range(4):
        for b in range(4):
            v, u = 32 + a, 68 + b
            rows, cols = stem.rel_rows[:, :, v - 33 + 3], stem.rel_cols[:, :, u - 70 + 3]
            r = torch.cat([rows, cols], 1).detach().double()
            logits[:, a, b] = (q * (key[:, v, u].view(maps.num_heads, -1) + r)).sum(1)
    expected = logits.flatten(1).softmax(1).view_as(logits)
    torch.testing.assert_close(block, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(maps.mean.sum((1, 2)), ones, rtol=0, atol=1e-12)


def test_padding_is_left_out_of_the_mean(model):
    image = torch.randint(0, 256, (3, 40, 64), dtype=torch.uint8)  # padded to 64 x 64
    module = model.backbone.bottom_up.res3[0].attention
    (x,) = inputs_of(module, model, image)
    assert x.shape[2:] == (16, 16)
    expected = literal_windows(module, x)[:10].mean((0, 1))
    maps = attention_maps(model, image, "res3.0", (0, 39.5))
    assert maps.pixel == (9, 0)
    torch.testing.assert_close(maps.mean, expected, rtol=0, atol=1e-6)


def test_the_point_is_in_pixels_of_the_image_before_resizing(model, image):
    given = {"image": image, "height": 32, "width": 48}
    small = attention_maps(model, given, "res3.0", (35, 16.5))
    large = attention_maps(model, image, "res3.0", (70, 33))
    assert small.pixel == large.pixel and small.cell == (2, 2) and large.cell == (4, 4)
    assert torch.equal(small.weights, large.weights)


def test_every_attention_layer_has_a_name(model, image):
    names = attention_layers(model)
    kinds = ("LocalSelfAttention2d", "_Stem")
    paths = [path for path, m in model.named_modules() if type(m).__name__ in kinds]
    shared = sum(path.startswith("head.") for path in paths)
    assert len(names) == len(set(names)) == len(paths) + 4 * shared
    assert {"stem", "res2.0", "res5.0", "fpn.output3", "fpn.p7", "head.cls.0@p3"} <= set(names)
    for name in names:
        maps = attention_maps(model, image, name, (95.9, 63.9))
        ones = torch.ones(maps.num_heads, dtype=torch.float64)
        torch.testing.assert_close(maps.weights.sum((1, 2)), ones, rtol=0, atol=1e-12)
        torch.testing.assert_close(maps.mean.sum((1, 2)), ones, rtol=0, atol=1e-12)


def test_the_model_is_left_as_it_was(model, image):
    model.train()
    attention_maps(model, image, "res2.0", (0, 0))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "layer, at, message",
    [
        ("res2.7", (0, 0), "layer res2.7 does not exist; did you mean res2.0?"),
        ("head.cls.0", (0, 0), "serves the levels p3, p4, p5, p6, p7: name one of them"),
        ("head.cls.0@p8", (0, 0), "not p8; did you mean head.cls.0@p"),
        ("res2.0@p3", (0, 0), "layer res2.0 serves no levels, so leave @p3 out"),
        ("fpn.lateral3", (0, 0), "layer fpn.lateral3 is a .* without attention"),
        ("res2", (0, 0), "layer res2 has several attention layers: name one of res2.0"),
        ("res2.0", (96, 0), "the point 96 0 is outside the image: X must be .* below 96"),
        ("res2.0", (0, math.nan), "outside the image"),
    ],
)
def test_a_mistake_is_one_sentence(model, image, layer, at, message):
    with pytest.raises(UsageError, match=message):
        attention_maps(model, image, layer, at)


def test_models_without_such_attention_are_refused(image):
    convolution = ["MODEL.SASA.STEM", "convolution", "MODEL.SASA.ATTENTION_STAGES", "[]"]
    convolution += ["MODEL.SASA.FPN", "convolution", "MODEL.SASA.HEAD", "convolution"]
    with pytest.raises(UsageError, match="the model has no attention layers"):
        attention_maps(make_model(*convolution), image, "res2.0", (0, 0))
    san = ["MODEL.BACKBONE.NAME", "build_retinanet_san_fpn_backbone", *convolution]
    with pytest.raises(UsageError, match="SAN backbone cannot be shown"):
        attention_maps(make_model(*san), image, "res2.0", (0, 0))


def test_the_picture_shows_the_weights(model, image, tmp_path):
    maps = attention_maps(model, image, "res3.0", (70, 33))
    rgb = image.permute(1, 2, 0).numpy()
    figure = draw_attention(maps, rgb, tmp_path / "maps.png", heads=[1, 0])
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["Head 1", "Head 0"]
    means = [axes.images[0].get_array() for axes in figure.axes if axes.get_xlabel() or axes.images]
    shown = [values for values in means if values.shape == (maps.kernel_size,) * 2]
    for values, head in zip(shown, (1, 0), strict=True):
        torch.testing.assert_close(torch.tensor(values.data), maps.mean[head])
    # The heads' cells on the image lie where their pixels are.
    (panel,) = [axes for axes in figure.axes if axes.get_title() == "Head 1"]
    cells = [patch for patch in panel.patches if patch.get_fill()]
    row, column = maps.pixel
    corners = {(patch.get_x(), patch.get_y()) for patch in cells}
    assert (column * 4.0, row * 4.0) in corners
    assert all(patch.get_width() == patch.get_height() == 4 for patch in cells)
    with pytest.raises(UsageError, match="no head 99: its heads are 0 to 7; did you mean 7"):
        draw_attention(maps, rgb, tmp_path / "other.png", heads=[99])
    with pytest.raises(UsageError, match="must end in .png, .pdf, .svg"):
        draw_attention(maps, rgb, tmp_path / "maps.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["maps.png"]

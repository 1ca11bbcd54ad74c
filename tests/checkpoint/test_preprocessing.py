import logging

import pytest
import yaml

from sasa_det.checkpoint.preprocessing import preprocessing_of, warn_of_preprocessing
from sasa_det.config.lazy import load_lazy_config
from sasa_det.engine import load_config

RGB = {
    "format": "RGB",
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
}
BGR = ["INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", RGB["pixel_mean"][::-1]]
CONFIG = "configs/ImageNet/Base-ImageNet.yaml"
LAZY = "configs/COCO-Detection/retinanet_SASA_R_50_full.py"


@pytest.fixture
def warned(caplog):
    """Return a function that gives what is warned of."""

    def warn(cfg, loaded):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            warn_of_preprocessing(cfg, loaded)
        return [record.getMessage() for record in caplog.records]

    return warn


def test_the_same_preprocessing(warned):
    assert warned(load_config(CONFIG), {"preprocessing": RGB}) == []
    # As others round it.
    near = {**RGB, "pixel_mean": [123.68, 116.28, 103.53], "pixel_std": [58.4, 57.12, 57.38]}
    assert warned(load_config(CONFIG), {"preprocessing": near}) == []
    assert warned(load_config(CONFIG), {"iteration": 3}) == []
    assert warned(load_lazy_config(LAZY).config, {"preprocessing": RGB}) == []


def test_the_keys_to_set_are_told_and_set(warned):
    cfg = load_config(CONFIG, [*BGR, "MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"])
    (message,) = warned(cfg, {"preprocessing": RGB})
    assert message.endswith(
        ': set INPUT.FORMAT "RGB" MODEL.PIXEL_MEAN "[123.675, 116.28, 103.53]" '
        'MODEL.PIXEL_STD "[58.395, 57.12, 57.375]".'
    )
    words = message.split(": set ")[1].rstrip(".").split('"')[:-1]
    assert warned(load_config(CONFIG, [*BGR, *map(str.strip, words)]), {"preprocessing": RGB}) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("format", "BGR"), ("pixel_mean", [123.0, 116.28, 103.53]), ("pixel_std", [1.0] * 3)],
)
def test_only_what_differs_is_told(warned, key, value):
    names = {"format": "FORMAT", "pixel_mean": "PIXEL_MEAN", "pixel_std": "PIXEL_STD"}
    (message,) = warned(load_config(CONFIG), {"preprocessing": {**RGB, key: value}})
    assert [name for name in names if names[name] in message] == [key]
    assert f'"{value}"' in message


def test_lazy_configs(warned):
    keys = ("dataloader.train.mapper.image_format", "model.pixel_mean", "model.pixel_std")
    cfg = load_lazy_config(LAZY, [f"{keys[0]}=BGR", f"{keys[2]}=[1.0,1.0,1.0]"]).config
    (message,) = warned(cfg, {"preprocessing": RGB})
    assert message.endswith(f': set "{keys[0]}=RGB" "{keys[2]}=[58.395, 57.12, 57.375]".')
    # What the calls of the config do not say is not known.
    del cfg.model.pixel_std
    assert warned(cfg, {"preprocessing": {**RGB, "format": "BGR"}}) == []
    stored = yaml.safe_load(load_lazy_config(LAZY, [f"{keys[0]}=BGR"]).dump())
    assert preprocessing_of(stored) == {**RGB, "format": "BGR"}


@pytest.mark.parametrize(
    "preprocessing",
    [
        *("RGB", {}, {"format": "RGB"}, {**RGB, "pixel_std": 1.0}, {**RGB, "format": 1}),
        *({**RGB, "format": "R\n"}, {**RGB, "format": ["RGB"]}, {**RGB, "pixel_mean": [0.0]}),
        *({**RGB, "pixel_mean": [float("nan")] * 3}, {**RGB, "pixel_std": [True, 1, 1]}),
        {**RGB, "pixel_std": [1.0, 1.0, 0.0]},
    ],
)
def test_what_is_not_understood(warned, preprocessing):
    (message,) = warned(load_config(CONFIG), {"preprocessing": preprocessing})
    assert "is not understood" in message


def test_of_a_config():
    assert preprocessing_of(load_config(CONFIG)) == RGB
    assert preprocessing_of({"INPUT": {"FORMAT": "RGB"}, "MODEL": {}}) is None
    assert preprocessing_of({}) is None

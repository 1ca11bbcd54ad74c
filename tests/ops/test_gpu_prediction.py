"""Predictions of times on GPUs, against what they are made of."""

import pytest

from sasa_det.ops.gpu_instructions import Work
from sasa_det.ops.gpu_prediction import GPUS, Layer, attention, convolution, gpu_of

H100 = GPUS[0]


def test_a_convolution_is_bound_by_its_products():
    times = convolution(Layer(256, 80), H100)
    assert times.forward == pytest.approx(2 * 9 * 256 * 256 * 8 * 80 * 80 / 550e12)
    assert times.step == pytest.approx(3 * times.forward)


NOTHING = Work(0, 0)


def test_attention_that_executes_nothing_is_bound_by_memory():
    times = attention(Layer(64, 160), H100, lambda *_: NOTHING)
    one_map = 2 * 8 * 64 * 160 * 160
    # The product reads one map and writes three; the kernel reads three and writes one.
    assert times.forward == pytest.approx(8 * one_map / 3.0e12 + 3e-6)
    # 8 sums of every channel and tile of 8 x 16 pixels are written and read again.
    sums = 4 * 8 * 64 * 8 * 20 * 10
    assert times.backward == pytest.approx((19 * one_map + 2 * sums) / 3.0e12 + 9e-6)


def test_work_is_counted_for_whole_blocks():
    def microseconds(size):
        # So many that nothing else matters.
        return attention(Layer(256, size), H100, lambda *_: Work(2e9, 5e8)).forward

    # 3 x 2 tiles of 8 x 16 pixels for 17 x 17 pixels, 2 x 1 for 16 x 16.
    assert microseconds(17) / microseconds(16) == pytest.approx(3, rel=1e-3)
    # 8 images, 8 heads of 32 channels, 6 tiles of 8 times 16 pixels, four instructions a clock.
    issued = 8 * 8 * 6 * 8 * (2e9 / 4 + 5e8) / (132 * 1.755e9)
    assert microseconds(17) == pytest.approx(issued, rel=1e-3)


def test_what_follows_attention_is_counted():
    def extra(**options):
        layers = (Layer(256, 80, **options), Layer(256, 80))
        first, second = (attention(x, H100, lambda *_: NOTHING) for x in layers)
        return first.forward - second.forward

    unit = 2 * 8 * 80 * 80 * 256
    # A quarter is written.
    assert extra(stride=2) == pytest.approx(-0.75 * unit / 3.0e12)
    assert extra(outputs=720) == pytest.approx(2 * 256 * 720 * 8 * 80 * 80 / 550e12, rel=0.1)
    assert convolution(Layer(256, 80, stride=2), H100).forward == pytest.approx(
        convolution(Layer(256, 40), H100).forward
    )


def test_levels_are_one_call_of_attention_and_several_of_convolution():
    layer = Layer(256, 20, other_sizes=(10, 5))
    levels = [convolution(Layer(256, size), H100).forward for size in (20, 10, 5)]
    assert convolution(layer, H100).forward == pytest.approx(sum(levels))
    # 3 x 2 tiles, 2 x 1 and one, of 8 images and 8 heads.
    issued = 8 * 8 * 9 * 8 * 1e9 / (132 * 1.755e9)
    times = attention(layer, H100, lambda *_: Work(2e9, 5e8))
    assert times.forward == pytest.approx(issued, rel=1e-3)


@pytest.mark.parametrize(
    "name,expected",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA H200", "H200"),
        ("Tesla T4", None),
    ],
)
def test_gpus_are_known_by_their_names(name, expected):
    gpu = gpu_of(name)
    assert (gpu and gpu.name) == expected

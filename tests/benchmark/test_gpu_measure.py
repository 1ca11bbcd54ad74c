"""What is measured on a GPU, run on a CPU where it can be."""

import inspect
import time
from dataclasses import replace

import pytest
import torch

from sasa_det.benchmark.gpu_measure import (
    WAYS,
    checked_variants,
    layer_maker,
    run_parts,
    ways_of,
)
from sasa_det.benchmark.gpu_tables import Measured, as_markdown
from sasa_det.ops.gpu_prediction import RETINANET, Layer, layers_by_size
from sasa_det.ops.gpu_report import main


def test_every_layer_is_measured_once_and_counted_as_often_as_it_occurs():
    layers = layers_by_size()
    assert len({layer.name for layer in layers}) == len(layers)
    assert {layer.name for layer in layers} == {layer.name for layer in RETINANET}
    assert sum(layer.count for layer in layers) == sum(layer.count for layer in RETINANET)
    (layer,) = (layer for layer in layers if layer.name == "256@40")
    assert layer.count == 5 + 1  # backbone, FPN
    assert {layer.name for layer in layers if not layer.is_plain} >= {
        "128@160/2",
        "256@80+40+20+10+5 to 720",
    }


@pytest.mark.parametrize("options", [{"stride": 2}, {"outputs": 20}], ids=str)
def test_convolution_and_attention_make_results_of_the_same_size(options):
    layer = Layer(16, 8, batch=2, **options)
    shapes = {
        layer_maker(layer, build, False, "cpu")()()[0].shape for build in ways_of(layer).values()
    }
    assert shapes == {(2, 16, 4, 4) if "stride" in options else (2, 20, 8, 8)}
    for build in ways_of(layer).values():
        gradients = layer_maker(layer, build, True, "cpu")()()
        assert all(x.isfinite().all() and x.any() for x in gradients)


def test_variants_are_measured_once():
    variants = [variant for variant, _ in checked_variants()]
    assert len(set(variants)) == len(variants) == 16


def fail(message="an illegal memory access\nMore"):
    raise RuntimeError(message)


def test_a_part_that_fails_is_noted_and_the_next_one_runs():
    measured, written = Measured("a GPU"), []
    parts = [
        ("first", lambda: measured.rows.append(1)),  # there are no such rows
        ("second", lambda: measured.layers.append("a row")),
        ("third", fail),
        ("fourth", lambda: measured.layers.append("another")),
    ]

    def write():
        written.append(as_markdown(replace(measured, layers=[]), {}, None))

    run_parts(measured, parts, time.monotonic() + 60, write, lambda: None)
    assert measured.layers == ["a row", "another"] and list(measured.seconds) == [*dict(parts)]
    assert measured.notes == [
        "first failed: AttributeError: 'Measured' object has no attribute 'rows'.",
        "third failed: RuntimeError: an illegal memory access.",
    ]
    assert all(note in written[-1] for note in measured.notes)
    measured = Measured("a GPU")
    run_parts(measured, parts[2:], time.monotonic() + 60, write, fail)
    assert measured.notes[1:] == ["The GPU cannot be used any more, for: fourth."]
    measured = Measured("a GPU")
    run_parts(measured, parts, time.monotonic() - 1, write, fail)
    assert measured.notes == [
        "Not begun for want of time (--minutes): first, second, third, fourth."
    ]


@pytest.mark.parametrize("name", ["convolution", "attention", "HaloAttn (timm)"])
def test_all_ways_do_the_same_work(name):
    if "timm" in name:
        pytest.importorskip("timm")
    layer = Layer(16, 8, batch=2)
    (output,) = layer_maker(layer, WAYS[name], False, "cpu")()()
    assert output.shape == (2, 16, 8, 8) and output.dtype == torch.bfloat16
    assert not output.requires_grad
    grad_input, *gradients = layer_maker(layer, WAYS[name], True, "cpu")()()
    assert grad_input.shape == output.shape
    assert all(x.isfinite().all() and x.any() for x in (grad_input, *gradients))


def test_two_copies_share_no_memory():
    addresses = []
    for _ in range(2):
        run = layer_maker(Layer(16, 8), WAYS["attention"], True, "cpu")()
        held = inspect.getclosurevars(run).nonlocals
        addresses.append({x.data_ptr() for x in (*held["inputs"], *held["grads"])})
    assert len(addresses[0]) == 7 and not addresses[0] & addresses[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_report_says_that_nothing_was_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sasa_det.ops.gpu_report.disassembler", lambda: None)
    monkeypatch.setattr("sasa_det.ops.gpu_report.resources", lambda *_: [{"kernel": "forward"}])
    main([])
    out = capsys.readouterr().out
    assert out.endswith("\n\nNothing was measured, as PyTorch finds no GPU.\n")
    assert not list(tmp_path.iterdir())

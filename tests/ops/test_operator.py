"""The operator as the C++ extension defines it, and as Python does where there is no extension."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import sasa_det
from sasa_det.ops import cpu, local_attention

needs_extension = pytest.mark.skipif(bool(cpu.MISSING), reason=str(cpu.MISSING))

PACKAGE = Path(sasa_det.__file__).parent


def make_inputs(dtype=torch.float32, requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 8, 4, 5)] * 3 + [(2, 2, 3)] * 2
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(requires_grad)
        for shape in shapes
    ]


def calls_of_python(function):
    """Return the names of the functions of sasa_det that run while ``function`` does."""
    names = []

    def note(frame, event, _):
        if event == "call" and PACKAGE in Path(frame.f_code.co_filename).parents:
            names.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return names


@needs_extension
@pytest.mark.parametrize("name", ["local_attention", "local_attention_backward"])
def test_both_definitions_have_one_schema(name):
    ours, python = (getattr(torch.ops.sasa_det, name + end).default for end in ("", "_in_python"))
    assert str(ours._schema) == str(python._schema).replace("_in_python", "")
    assert ours.tags == python.tags


@needs_extension
@pytest.mark.parametrize("backend", ["", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_what_the_kernels_take_never_enters_python(dtype, backend, autocast):
    inputs = make_inputs(dtype)
    operator = torch.ops.sasa_det.local_attention.default
    operator(*inputs, 3, 2, True, backend)  # the first call may tell the log what it runs on

    def train(*inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = operator(*inputs, 3, 2, True, backend)[0]
            torch.autograd.grad(output.sum(), [x for x in inputs if x is not None])

    query, key, value, *embeddings = inputs
    assert calls_of_python(lambda: train(*inputs)) == []
    assert calls_of_python(lambda: train(query, None, value, *embeddings)) == []
    assert calls_of_python(lambda: train(query, key, value, None, None)) == []
    with torch.no_grad():
        assert calls_of_python(lambda: operator(*inputs, 3, 2, True, backend)) == []
    # What they do not take does, or nothing would have been counted above.
    assert "attend" in calls_of_python(
        lambda: operator(*make_inputs(torch.float64), 3, 2, True, "")
    )


@needs_extension
@pytest.mark.parametrize("key", ["CPU", "CUDA", "XPU", "Meta", "AutogradCPU", "AutogradCUDA"])
@pytest.mark.parametrize("name", ["local_attention", "local_attention_backward"])
def test_every_device_has_a_kernel(name, key):
    has_kernel = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    assert has_kernel(f"sasa_det::{name}", key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_the_gradient_is_refused_when_it_is_asked_for(dtype):
    inputs = make_inputs(dtype)
    output = local_attention(*inputs, kernel_size=3, num_heads=2)
    expected = torch.autograd.grad(output.sum(), inputs, retain_graph=True)
    grads = torch.autograd.grad(output.sum(), inputs, create_graph=True)
    torch.testing.assert_close(grads, expected)
    with pytest.raises(RuntimeError, match="local_attention_backward"):
        grads[0].sum().backward()


@pytest.mark.parametrize("backend", ["cpu", "loop"])
def test_training_keeps_the_inputs_and_nothing_of_the_window(backend):
    if backend == "cpu" and cpu.MISSING:
        pytest.skip(cpu.MISSING)
    inputs = make_inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        output, log_sum = torch.ops.sasa_det.local_attention(*inputs, 3, 2, True, backend)
    assert [x.data_ptr() for x in saved] == [x.data_ptr() for x in (*inputs, log_sum)]
    assert log_sum.shape == ((0,) if backend == "cpu" else (2, 2, 4, 5))
    assert output.requires_grad and not log_sum.requires_grad


def test_window_and_heads_may_be_symbols():
    inputs = make_inputs(requires_grad=False)

    def function(*inputs, kernel_size, num_heads):
        return local_attention(*inputs, kernel_size=kernel_size, num_heads=num_heads)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for num_heads in (2, 1):
        embeddings = [x[:1].repeat(1, 2, 1) if num_heads == 1 else x for x in inputs[3:]]
        options = {"kernel_size": 3, "num_heads": num_heads}
        actual = compiled(*inputs[:3], *embeddings, **options)
        torch.testing.assert_close(actual, function(*inputs[:3], *embeddings, **options))


# Operators do not need detectron2, which takes seconds to import.
WITHOUT_DETECTRON2 = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "detectron2" else find(name, *a)
"""
SCRIPT = """
import logging, sys
import torch

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("sasa_det._C_torch"):
            raise ModuleNotFoundError(name)

if sys.argv[1] == "absent":
    sys.meta_path.insert(0, Absent())
from sasa_det.ops import available_backends, local_attention

messages = []
handler = logging.Handler()
handler.emit = lambda record: messages.append(record.getMessage())
logging.getLogger("sasa_det").addHandler(handler)
logging.getLogger("sasa_det").setLevel("INFO")

def run(dtype, border, content, relative):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 8, 6, 9)] * 3 + [(2, 2, 5)] * 2
    query, key, value, *embeddings = (
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes
    )
    inputs = [query, key if content else None, value, *(embeddings if relative else (None, None))]
    output = local_attention(*inputs, kernel_size=5, num_heads=2, border=border, content=content)
    present = [x for x in inputs if x is not None]
    return [output, *torch.autograd.grad(output.square().sum(), present)]

results = [
    run(dtype, border, *terms)
    for dtype in (torch.float32, torch.float64)
    for border in ("mask", "zero")
    for terms in ((True, True), (True, False), (False, True))
]
names = ("local_attention", "local_attention_backward")
schemas = [str(getattr(torch.ops.sasa_det, name).default._schema) for name in names]
found = {"schemas": schemas, "results": results}
torch.save({**found, "backends": list(available_backends()), "log": messages}, sys.argv[2])
"""


@pytest.mark.slow
@needs_extension
def test_the_same_with_and_without_the_extension(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    found = []
    for extension in ("present", "absent"):
        script = WITHOUT_DETECTRON2 + SCRIPT
        command = [sys.executable, "-c", script, extension, tmp_path / extension]
        subprocess.run(command, env=env, check=True, timeout=300)
        found.append(torch.load(tmp_path / extension))
    present, absent = found
    assert present["schemas"] == absent["schemas"]
    torch.testing.assert_close(present["results"], absent["results"], rtol=1e-5, atol=1e-4)
    assert "cpu" in present["backends"] and "cpu" not in absent["backends"]
    # Every choice is told once.
    begins = "local_attention runs on the {} backend ("
    on_cpu, on_loop = present["log"]
    assert on_cpu.startswith(begins.format("cpu")) and on_loop.startswith(begins.format("loop"))
    assert "; cpu does not: it takes float32 or bfloat16, not torch.float64" in on_loop
    (without,) = absent["log"]
    assert without.startswith(begins.format("loop"))
    assert "; cpu does not: sasa_det was installed without its C++ kernels" in without


@pytest.mark.parametrize(
    ("release", "reason"),
    [
        (None, "the C++ kernels do not fit this PyTorch, reinstall sasa_det ("),
        ("1.13", "the C++ kernels were built with PyTorch 1.13, and this is "),
    ],
)
def test_kernels_that_do_not_fit_are_a_warning(tmp_path, release, reason):
    """Also those of another PyTorch, which could be loaded by chance."""
    release = release or ".".join(torch.__version__.split(".")[:2])
    no_kernels = shutil.ignore_patterns("*.so", "csrc", "weights", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "sasa_det", ignore=no_kernels)
    extension = f"_C_torch{release.replace('.', '_')}{sysconfig.get_config_var('EXT_SUFFIX')}"
    (tmp_path / "sasa_det" / extension).write_bytes(b"of another world")
    code = """
import sys, torch
# Of editable installations, which would find the kernels of this one.
sys.meta_path = [x for x in sys.meta_path if "editable" not in str(x).lower()]
from sasa_det.ops import local_attention
q, rel = torch.ones(1, 4, 5, 5), torch.zeros(1, 2, 3)
for _ in range(2):
    y = local_attention(q, q, q, rel, rel, kernel_size=3, num_heads=1)
torch.testing.assert_close(y, q)
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_DETECTRON2 + code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("local_attention runs on the loop backend (")
    assert reason in line

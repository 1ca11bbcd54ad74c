"""The formats: a flat model is written as a file that holds facts about itself."""

import importlib
import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

import detectron2.export
import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..modeling import fuse
from ..utils.files import whole_file
from .decompositions import SHORT_DECOMPOSITIONS, Decompose
from .flatten import flatten_model

# Suffixes of the files.
FORMATS = {"torchscript": ".ts", "torch_export": ".pt2", "onnx": ".onnx"}

# The name of the facts in a file: of its extra file, or of its entry of ONNX's metadata.
FACTS = "sasa_det.json"

# detectron2's, where it names one.
ONNX_OPSET = getattr(detectron2.export, "STABLE_ONNX_OPSET_VERSION", 11)

# The first one that has the RoIAlign of detectron2's R-CNNs, whose pixels are aligned; older files
# find other boxes.
RCNN_ONNX_OPSET = 16

# Height and width of an image in a file for all sizes. The strides of the levels make sizes of 1 of
# smaller ones; a larger one than that is a mistake.
SMALLEST, LARGEST = 32, 8192


def export_model(
    model: nn.Module,
    image: Tensor,
    path: str | os.PathLike,
    format: str,
    *,
    facts: Mapping[str, Any] | None = None,
    dynamic: bool = True,
    raw: bool = False,
) -> None:
    """Write a model as a file that runs without this package.

    The batch norms are fused into the weights, see :func:`sasa_det.modeling.fuse`. The file takes
    one image, (C, H, W) float32 in 0 to 255, and gives what :func:`flatten_model` does.

    Args:
        model: a RetinaNet, a classifier, or an R-CNN of detectron2, on the CPU.
        image: a sample, (C, H, W) float32 in 0 to 255.
        path: the file to write, whole or not at all.
        format: of :data:`FORMATS`.
        facts: what the file is to hold about the model, JSON values; "kind", "outputs" and
            "input_size", [H, W] or None, are added.
        dynamic: whether the file takes images of any size of at least 32 pixels, or of the size of
            the sample alone.
        raw: see :func:`flatten_model`.

    Raises:
        UsageError: if the model or the format does not allow it, or a library is missing.
    """
    if format not in FORMATS:
        raise UsageError(f"the format must be one of {', '.join(FORMATS)}, got {format!r}.")
    if format == "onnx":
        need("onnx", "the format onnx")
    flat = flatten_model(fuse(model), image, raw=raw).eval()
    if format == "torch_export" and isinstance(flat, detectron2.export.TracingAdapter):
        raise UsageError(
            f"a {type(model).__name__} cannot be exported as torch_export, for detectron2 exports "
            "its R-CNNs by tracing alone: use --format torchscript or onnx."
        )
    size = None if dynamic else list(image.shape[1:])
    known = {"kind": flat.kind, "outputs": list(flat.output_names), "input_size": size}
    text = json.dumps({**(facts or {}), **known})
    writer = {"torchscript": _torchscript, "torch_export": _torch_export, "onnx": _onnx}[format]
    with torch.no_grad(), warnings.catch_warnings(), whole_file(path) as part:
        # The traces hold no sizes of the sample, which the warnings are about.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        writer(flat, image, os.fspath(part), text, dynamic)


def need(library: str, what: str) -> Any:
    """Import a library that is not among those which every installation has.

    Raises:
        UsageError: if it is missing, with the command that installs it.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise UsageError(f"{what} needs {library}: run `pip install {library}`.") from error


def _torchscript(flat: nn.Module, image: Tensor, path: str, facts: str, dynamic: bool) -> None:
    with Decompose():
        traced = torch.jit.trace(flat, (image,), check_trace=False)
    torch.jit.save(traced, path, _extra_files={FACTS: facts})


def exported_program(flat: nn.Module, image: Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    """Return a flat model as a program of ``torch.export`` in core ATen operators."""
    if dynamic:
        # From a sample whose coarsest maps are not of one pixel, which torch.export would keep.
        image = image.new_zeros(image.shape[0], 512, 640)
    sides = [torch.export.Dim.DYNAMIC(min=SMALLEST, max=LARGEST) for _ in range(2)]
    shapes = ({1: sides[0], 2: sides[1]},) if dynamic else None
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        program = torch.export.export(flat, (image,), dynamic_shapes=shapes, strict=False)
    # The attention operators afterwards: tracing what they are made of once takes half the time.
    return program.run_decompositions(
        {**torch.export.default_decompositions(), **SHORT_DECOMPOSITIONS}
    )


def _torch_export(flat: nn.Module, image: Tensor, path: str, facts: str, dynamic: bool) -> None:
    program = exported_program(flat, image, dynamic)
    torch.export.save(program, path, extra_files={FACTS: facts})


def _onnx(flat: nn.Module, image: Tensor, path: str, facts: str, dynamic: bool) -> None:
    onnx = need("onnx", "the format onnx")
    is_rcnn = isinstance(flat, detectron2.export.TracingAdapter)
    opset = RCNN_ONNX_OPSET if is_rcnn else ONNX_OPSET
    axes = {name: {0: "found"} for name in flat.output_names} if flat.kind == "detector" else {}
    if dynamic:
        axes["image"] = {1: "height", 2: "width"}
    # Through a trace, as detectron2 exports: one way for all models, R-CNNs among them.
    torch.onnx.export(
        flat,
        (image,),
        path,
        input_names=["image"],
        output_names=list(flat.output_names),
        opset_version=opset,
        dynamic_axes=axes,
        dynamo=False,
    )
    model = onnx.load(path)
    model.metadata_props.add(key=FACTS, value=facts)
    onnx.checker.check_model(model)
    onnx.save(model, path)

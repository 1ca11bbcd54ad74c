"""Models that were exported, called as the models that they were made from."""

import copy
import inspect
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..errors import CheckpointError, UsageError, first_line
from .formats import FACTS, FORMATS, need


def is_exported(path: str | os.PathLike) -> bool:
    """Tell by its suffix whether a file is one of :func:`sasa_det.export.export_model`."""
    return Path(path).suffix.lower() in FORMATS.values()


def read_exported(path: str | os.PathLike) -> "ExportedModel":
    """Read a file of :func:`sasa_det.export.export_model`; it runs on the CPU.

    Raises:
        CheckpointError: if it is not such a file.
        UsageError: if onnxruntime is missing, or the file gives features and no objects.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    runtime = need("onnxruntime", "an ONNX file") if path.suffix.lower() == ".onnx" else None
    try:
        # Each format has exceptions of its own for what is not of that format.
        run, text = _OPEN[path.suffix.lower()](path, runtime)
        facts = json.loads(text)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as {path.suffix[1:]} ({first_line(error)})."
        ) from error
    if not isinstance(facts, dict) or "kind" not in facts:
        raise CheckpointError(f"{path} was not written by sasa-det export.")
    if facts["kind"] == "raw":
        raise UsageError(f"{path} was exported with --raw: it gives features and finds no objects.")
    return ExportedModel(run, facts)


def _open_torchscript(path: Path, _) -> tuple[Callable, str]:
    import torchvision  # noqa: F401  (it has the operator of NMS)

    extra = {FACTS: ""}
    with warnings.catch_warnings():
        # That TorchScript is deprecated, which a file that is there does not change.
        warnings.simplefilter("ignore", FutureWarning)
        return torch.jit.load(path, map_location="cpu", _extra_files=extra), _text(extra)


def _open_torch_export(path: Path, _) -> tuple[Callable, str]:
    import torchvision  # noqa: F401

    extra = {FACTS: ""}
    program = torch.export.load(path, extra_files=extra)
    # What is guarded are strides of maps of one pixel, on which no operator depends. Versions that
    # guard nothing have no such argument.
    guarded = "check_guards" in inspect.signature(program.module).parameters
    return program.module(**({"check_guards": False} if guarded else {})), _text(extra)


def _open_onnx(path: Path, runtime: Any) -> tuple[Callable, str]:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> list[Tensor]:
        outputs = session.run(None, {"image": image.numpy()})
        return [torch.from_numpy(np.asarray(x)) for x in outputs]

    return run, session.get_modelmeta().custom_metadata_map.get(FACTS, "null")


def _text(extra: Mapping[str, str | bytes]) -> str:
    text = extra[FACTS]
    return (text.decode() if isinstance(text, bytes) else text) or "null"


_OPEN = {".ts": _open_torchscript, ".pt2": _open_torch_export, ".onnx": _open_onnx}


class ExportedModel(nn.Module):
    """An exported detector or classifier, with the inputs and outputs of detectron2's models.

    Attributes:
        facts (dict): what the file holds about the model.
        test_score_thresh (float): scores below it are left out.
        test_nms_thresh (float): the threshold that is part of the file.
        max_detections_per_image (int): likewise.
    """

    def __init__(self, run: Callable[[Tensor], Sequence[Tensor]], facts: Mapping[str, Any]):
        super().__init__()
        object.__setattr__(self, "_run", run)  # not a part of this module
        self.facts = dict(facts)
        self._threshold = self._least = facts.get("score_threshold", 0.0)
        self.test_nms_thresh = facts.get("nms_threshold", 0.5)
        self.max_detections_per_image = facts.get("max_detections", 100)

    def __deepcopy__(self, memo: dict) -> "ExportedModel":
        copied = ExportedModel(self._run, copy.deepcopy(self.facts, memo))
        copied._threshold = self._threshold
        return copied

    @property
    def test_score_thresh(self) -> float:
        return self._threshold

    @test_score_thresh.setter
    def test_score_thresh(self, value: float) -> None:
        if value < self._least:
            raise UsageError(
                f"the score threshold must be at least {self._least:g}, with which the file was "
                f"exported, got {value:g}."
            )
        self._threshold = value

    @torch.no_grad()
    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """
        Args:
            batched_inputs: of each image "image", (C, H, W) in 0 to 255, and for a detector
                "height" and "width" of the image that boxes are wanted for.

        Returns:
            list[dict]: "instances" of each image, or "scores" of a classifier.
        """
        return [self._infer(inputs) for inputs in batched_inputs]

    def _infer(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        image = torch.as_tensor(inputs["image"]).float().contiguous()
        if self.facts["kind"] == "classifier":
            return {"scores": self._run(image)[0]}
        shown, size = self._fitted(image)
        outputs = dict(zip(self.facts["outputs"], self._run(shown), strict=True))
        found = Instances(size)
        found.pred_boxes = Boxes(outputs["boxes"])
        found.scores, found.pred_classes = outputs["scores"], outputs["classes"]
        if "masks" in outputs:
            found.pred_masks = outputs["masks"]
        found = found[found.scores >= self._threshold]
        height, width = inputs.get("height", image.shape[1]), inputs.get("width", image.shape[2])
        return {"instances": detector_postprocess(found, height, width)}

    def _fitted(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Fit an image into the size of the file, if it has one; return it and its own size."""
        size = self.facts.get("input_size")
        height, width = image.shape[1:]
        if size is None:
            return image, (height, width)
        scale = min(size[0] / height, size[1] / width, 1.0)
        if scale < 1:
            height, width = max(int(height * scale), 1), max(int(width * scale), 1)
            image = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
        # With what becomes zero, as detectron2 pads.
        full = torch.tensor(self.facts["pixel_mean"]).view(-1, 1, 1).repeat(1, *size)
        full[:, :height, :width] = image
        return full, (height, width)

"""Models as files that run without this package: TorchScript, torch.export and ONNX."""

from .decompositions import DECOMPOSITIONS, Decompose
from .exported import ExportedModel, read_exported
from .flatten import flatten_model
from .formats import FORMATS, export_model

__all__ = [
    "DECOMPOSITIONS",
    "Decompose",
    "ExportedModel",
    "FORMATS",
    "export_model",
    "flatten_model",
    "read_exported",
]

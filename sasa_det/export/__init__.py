"""Models as files that run without this package: TorchScript, torch.export and ONNX."""

from .decompositions import DECOMPOSITIONS, Decompose
from .exported import ExportedModel, is_exported, read_exported
from .flatten import flatten_model
from .formats import FORMATS, export_model, exported_program, need

__all__ = [
    "DECOMPOSITIONS",
    "Decompose",
    "ExportedModel",
    "FORMATS",
    "export_model",
    "exported_program",
    "flatten_model",
    "is_exported",
    "need",
    "read_exported",
]

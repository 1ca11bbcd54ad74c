"""When a model is read for a file that other programs run."""

import torch


def is_making_onnx() -> bool:
    """Tell whether ``torch.onnx.export`` is running; no ONNX file can hold operators of ours."""
    return torch.onnx.is_in_onnx_export()


def is_exporting() -> bool:
    """Tell whether ``torch.export`` or ``torch.onnx.export`` is running."""
    return torch.compiler.is_exporting() or is_making_onnx()

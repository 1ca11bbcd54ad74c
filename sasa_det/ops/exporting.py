"""Who else sees the operators of a model while it runs: exporters, counters and transforms."""

import torch
from torch import Tensor


def is_making_onnx() -> bool:
    """Tell whether ``torch.onnx.export`` is running; no ONNX file can hold operators of ours."""
    return torch.onnx.is_in_onnx_export()


def is_exporting() -> bool:
    """Tell whether ``torch.export`` or ``torch.onnx.export`` is running."""
    return torch.compiler.is_exporting() or is_making_onnx()


def is_looked_at() -> bool:
    """Tell whether something sees operators as they run, such as a counter or a transform."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


def why_not_instead(x: Tensor) -> str | None:
    """Return why kernels cannot run in place of the operators that take ``x``, or None."""
    if type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "traces and compiled models have operators alone"
    if is_looked_at():
        return "operators are looked at one by one"
    return None

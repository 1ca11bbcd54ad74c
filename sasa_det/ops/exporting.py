"""Who else sees the operators of a model while it runs: exporters, counters and transforms."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_making_onnx() -> bool:
    """Tell whether ``torch.onnx.export`` is running; no ONNX file can hold operators of ours."""
    return torch.onnx.is_in_onnx_export()


def is_exporting() -> bool:
    """Tell whether ``torch.export`` or ``torch.onnx.export`` is running."""
    return torch.compiler.is_exporting() or is_making_onnx()


def is_looked_at() -> bool:
    """Tell whether something sees operators as they run, such as a counter or a transform."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or wants_forward_gradients()
    )


def wants_forward_gradients() -> bool:
    """Tell whether forward-mode gradients may be asked for.

    Operators of ``torch.library`` would lose them without a word; standard operators have them.
    """
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def needs_standard_operators() -> bool:
    """Tell whether operators of ours cannot do, and PyTorch's must."""
    return is_making_onnx() or wants_forward_gradients()


def why_not_instead(x: Tensor) -> str | None:
    """Return why kernels cannot run in place of the operators that take ``x``, or None."""
    if type(x) is not Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "traces and compiled models have operators alone"
    if is_looked_at():
        return "operators are looked at one by one"
    return None

"""CPU backend: the C++ kernels of csrc/, built where there was a compiler at installation."""

import importlib
from pathlib import Path

import torch
from torch import Tensor

# Named after the release of PyTorch that it was built with, as in setup.py: another one may load it
# and crash.
_PREFIX = "_C_torch"
_RELEASE = torch.__version__.split(".")[:2]


def _why_absent() -> str:
    """Return why there is no extension for this PyTorch."""
    this = ".".join(_RELEASE)
    files = Path(__file__).parents[1].glob(f"{_PREFIX}*.so")
    built = {file.name.split(".")[0].removeprefix(_PREFIX).replace("_", ".") for file in files}
    if others := " and ".join(sorted(built - {this})):
        return (
            f"the C++ kernels were built with PyTorch {others}, and this is {this}: "
            "reinstall sasa_det"
        )
    return "sasa_det was installed without its C++ kernels"


# Why the kernels are not there, or None.
try:
    # It registers the operators of csrc/operators.cpp and those of torch.ops.sasa_det_cpu.
    EXTENSION = importlib.import_module(f"sasa_det.{_PREFIX}{'_'.join(_RELEASE)}")
except ModuleNotFoundError:
    MISSING = _why_absent()
except ImportError as error:
    MISSING = f"the C++ kernels do not fit this PyTorch, reinstall sasa_det ({error})"
else:
    MISSING = None
    # What was added last.
    if not hasattr(torch.ops.sasa_det_cpu, "pointwise_max"):
        MISSING = "the C++ kernels are those of an older sasa_det, reinstall it"

SUMMARY = "C++, vectorised over pixels, for CPU tensors of float32 or bfloat16"


def instruction_sets() -> list[str]:
    """Name the instruction sets with kernels that this processor can run, widest first.

    Returns:
        list[str]: of "avx512", "avx2" and "plain"; none where the kernels were not built.
    """
    return [] if MISSING else torch.ops.sasa_det_cpu.instruction_sets()


def why_not(query: Tensor, num_heads: int, kernel_size: int, forced: bool = False) -> str | None:
    """Return why inputs like ``query`` cannot run here, or None if they can."""
    if MISSING:
        return MISSING
    if query.device.type != "cpu":
        return f"it takes CPU tensors, not {query.device.type}"
    if query.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 or bfloat16, not {query.dtype}"
    return None


def forward(query: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    """See :func:`sasa_det.ops.operator.attend`; the backward pass needs no log-sum-exp."""
    output = torch.ops.sasa_det_cpu.local_attention(query, *arguments, "")
    return output, query.new_empty(0, dtype=torch.float32)


def backward(grad, query, key, value, rel_rows, rel_cols, log_sum, kernel_size, num_heads, mask):
    """See :func:`sasa_det.ops.operator.attend_backward`."""
    return torch.ops.sasa_det_cpu.local_attention_backward(
        grad, query, key, value, rel_rows, rel_cols, kernel_size, num_heads, mask, ""
    )

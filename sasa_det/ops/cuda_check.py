"""The check of the CUDA kernels before their first use on a GPU.

A process of its own compares their results for a small image with those of the loop backend in
float32, for each type, head width and kernel size: a kernel that reads or writes where it must not
ends that process, and not the user's. If results differ, or a kernel does not compile, a warning
says so and the next backend is used. What a check has found is kept on the disk beside the compiled
kernels, for this source, GPU, driver and PyTorch.

``SASA_DET_SELF_CHECK=0`` uses the kernels unchecked, ``SASA_DET_SELF_CHECK=1`` checks them again.
"""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.files import whole_file
from . import cpu, loop
from .cuda_compiler import CompilerError, cache_folder, source_digest
from .cuda_kernels import Split, Variant
from .levels import join, split
from .pooling import avg_pool_rounding_up
from .precision import autocast_disabled

logger = logging.getLogger(__name__)

CHECK_VARIABLE = "SASA_DET_SELF_CHECK"

# Of the largest values of each result, or of 1.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
RESULTS = ("output", "grad_query", "grad_key", "grad_value", "grad_rel_rows", "grad_rel_cols")
LAYER = "layer"  # the same kernels started from C++: the largest error of all results

_SECONDS_TO_START = 120  # of the process: Python, PyTorch and a context on the GPU
_SECONDS_OF_VARIANT = 60  # most of which are for compiling
_BEGINNING = time.time()  # of this process, nearly
_MARK = "sasa_det check: "
# What the process runs: without all that importing the package registers, which takes seconds.
_PROGRAM = f"""
import sys, types
package = sys.modules["sasa_det"] = types.ModuleType("sasa_det")
package.__path__ = [{str(Path(__file__).parents[1])!r}]
from {__name__} import main
main()
"""


@dataclass(frozen=True)
class Verdict:
    """What a check has found.

    Args:
        errors: the largest error of each result, of the result's largest value or of 1.
        problem: why the kernels cannot be used, or None.
        transient: whether another check may find something else, as the problem was one of time or
            memory.
    """

    errors: dict[str, float]
    problem: str | None = None
    transient: bool = False


_verdicts: dict[tuple[torch.device, Variant], Verdict] = {}


def why_not_correct(device: torch.device, variant: Variant) -> str | None:
    """Return what a check of kernels has found wrong, or None; it is made at the first call.

    Args:
        device: a GPU.
        variant: of the kernels.

    Raises:
        ValueError: if the environment variable SASA_DET_SELF_CHECK is neither 0 nor 1.
    """
    setting = os.environ.get(CHECK_VARIABLE) or None
    if setting not in (None, "0", "1"):
        raise ValueError(f"{CHECK_VARIABLE} must be 0 or 1, got {setting!r}.")
    if setting == "0":
        return None
    key = (device, variant)
    if key not in _verdicts:
        # A graph that is captured here takes no other work in this process.
        if torch.cuda.is_current_stream_capturing():
            return None
        verdict = _verdicts[key] = _kept_verdict(device, variant, again=setting == "1")
        if verdict.problem:
            logger.warning(
                "local_attention does not use its CUDA kernels for %s, heads of %d channels and "
                "kernel_size %d%s: %s. %s=1 checks them again.",
                *(variant.dtype, variant.head_width, variant.kernel_size),
                " with a stride of 2" if variant.pooled else "",
                *(verdict.problem.rstrip("."), CHECK_VARIABLE),
            )
    return _verdicts[key].problem


def _kept_verdict(device: torch.device, variant: Variant, again: bool) -> Verdict:
    path = cache_folder() / "checks" / f"{_facts_digest(device, variant)}.json"
    return keep_verdict(path, lambda: check([variant], device)[0], again)


def keep_verdict(path: Path, make: Callable[[], Verdict], again: bool = False) -> Verdict:
    """Read a verdict, or make and keep it. Other processes wait, and read it too.

    One that is transient is for processes that run already, such as the others of a training.

    Args:
        path: where it is kept.
        make: makes it.
        again: makes it even if there is one.
    """
    verdict = None
    try:
        with whole_file(path) as part:
            if not again:
                verdict = _read_verdict(path)
            if verdict is None:
                verdict = make()
            part.write_text(json.dumps(asdict(verdict)))
    except OSError as error:
        logger.warning("Checks of CUDA kernels cannot be kept; every run makes them: %s.", error)
    return make() if verdict is None else verdict


def _read_verdict(path: Path) -> Verdict | None:
    """Return what is kept; None if there is nothing, or what is damaged or of no use any more."""
    if not path.exists():
        return None
    try:
        verdict = Verdict(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        return None
    return None if verdict.transient and path.stat().st_mtime < _BEGINNING else verdict


def _facts_digest(device: torch.device, variant: Variant) -> str:
    """Return a name for all that a verdict depends on."""
    properties = torch.cuda.get_device_properties(device)
    gpu = (properties.name, properties.major, properties.minor)
    launchers = [path.read_text() for path in sorted(Path(__file__).parent.glob("cuda*.py"))]
    facts = (_as_json(variant), *gpu, _driver_version(), torch.__version__, *launchers)
    return source_digest(*facts, _extension_facts())


def _extension_facts() -> tuple[int, ...]:
    """Return what tells builds of the extension apart, which starts the kernels of layers."""
    if cpu.MISSING:
        return ()
    built = Path(cpu.EXTENSION.__file__).stat()
    return built.st_size, built.st_mtime_ns  # and not when it was read


def _driver_version() -> str:
    known = Path("/proc/driver/nvidia/version")
    if known.exists():
        return known.read_text()
    from cuda.bindings import driver

    return str(driver.cuDriverGetVersion())


def check_now(variants: Sequence[Variant], device: torch.device, seconds: float) -> list[Verdict]:
    """Check kernels, whatever is known of them; this process uses what it finds.

    Args:
        variants, device, seconds: see :func:`check`.
    """
    verdicts = check(variants, device, seconds)
    _verdicts.update(zip([(device, x) for x in variants], verdicts, strict=True))
    return verdicts


def check(
    variants: Sequence[Variant], device: torch.device, seconds: float = math.inf
) -> list[Verdict]:
    """Compare kernels with the loop backend in processes of their own.

    Where no other process can use the GPU, they are compared in this one.

    Args:
        variants: of the kernels.
        device: a GPU.
        seconds: that it may take; what it does not come to has a problem.

    Returns:
        list[Verdict]: one for each variant.
    """
    logger.info("The CUDA kernels are compared with the loop backend, which takes some seconds.")
    end = time.monotonic() + seconds
    verdicts: list[Verdict] = []
    while len(verdicts) < len(variants):
        rest = variants[len(verdicts) :]
        left = end - time.monotonic()
        if left <= 0:
            return verdicts + [Verdict({}, "there was no time to check it", True) for _ in rest]
        found = in_other_process(_command(device), rest, most_seconds=left)
        if found is None:
            logger.info("CUDA kernels are checked in this process: no other one can use the GPU.")
            return verdicts + [verdict_of(variant, device) for variant in rest]
        verdicts += found
    return verdicts


def _command(device: torch.device) -> list[str] | None:
    """Return what starts the process, or None where this is not run by a Python interpreter."""
    if not sys.executable or getattr(sys, "frozen", False):
        return None
    return [sys.executable, "-c", _PROGRAM, str(device)]


def in_other_process(
    command: Sequence[str] | None,
    variants: Sequence[Variant],
    seconds_to_start: float = _SECONDS_TO_START,
    seconds_of_variant: float = _SECONDS_OF_VARIANT,
    most_seconds: float = math.inf,
) -> list[Verdict] | None:
    """Return verdicts of a process, as many as it came to, at least one; None if it cannot begin.

    Args:
        command: starts it; see :func:`main`.
        variants: to check.
        seconds_to_start, seconds_of_variant: how long it may take to begin, and for each of them.
        most_seconds: how long it may take in all.
    """
    if command is None:
        return None
    paths = os.pathsep.join(path for path in sys.path if path)
    timeout = min(seconds_to_start + seconds_of_variant * len(variants), most_seconds)
    try:
        done = subprocess.run(
            command,
            input=json.dumps([_as_json(variant) for variant in variants]),
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        output, end = done.stdout, _describe_end(done.returncode)
        # As where memory is short.
        transient = done.returncode == -signal.SIGKILL
    except subprocess.TimeoutExpired as late:
        # Bytes, whatever `text` says.
        output, end = (late.stdout or b"").decode(), f"took more than {late.timeout:.0f} s"
        transient = True
    except OSError as error:
        logger.info("No process for the check of CUDA kernels can be started: %s.", error)
        return None
    lines = [x.removeprefix(_MARK) for x in output.splitlines() if x.startswith(_MARK)]
    if not lines:
        return None
    verdicts = [Verdict(**json.loads(line)) for line in lines[1:]]  # the first says that it began
    if len(verdicts) < len(variants) and not (verdicts and verdicts[-1].problem):
        verdicts.append(Verdict({}, f"the process that compared them {end}", transient))
    return verdicts


def _describe_end(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    return f"was ended by {signal.Signals(-status).name}"


def _as_json(variant: Variant) -> dict[str, object]:
    return {**asdict(variant), "dtype": str(variant.dtype).removeprefix("torch.")}


def _from_json(facts: dict[str, Any]) -> Variant:
    of_tile = facts["split"] and Split(*facts["split"])
    return Variant(**{**facts, "dtype": getattr(torch, facts["dtype"]), "split": of_tile})


def main() -> None:
    """Compare kernels on the GPU that the command line names; variants come from standard input.

    Standard output has a line when the GPU is ready, and one for each variant. After an error that
    leaves a process which cannot use the GPU any more, it ends.
    """
    device = torch.device(sys.argv[1])
    _use(device)
    print(f"{_MARK}begins", flush=True)
    for facts in json.load(sys.stdin):
        verdict = verdict_of(_from_json(facts), device)
        print(f"{_MARK}{json.dumps(asdict(verdict))}", flush=True)
        if verdict.problem:
            try:
                _use(device)
            except RuntimeError:
                return


def _use(device: torch.device) -> None:
    torch.zeros(1, device=device).item()


def verdict_of(variant: Variant, device: torch.device) -> Verdict:
    """Compare kernels with the loop backend in this process.

    Args:
        variant: what to compile them for.
        device: where to run them.
    """
    try:
        # The first call of a layer may come from within an autocast context.
        with outside_of_forward(), torch.no_grad(), autocast_disabled(device):
            errors = errors_of(variant, device)
    except RuntimeError as error:
        return _verdict_of_error(error)
    return judge(errors, TOLERANCE[variant.dtype], "the loop backend's")


def _verdict_of_error(error: RuntimeError) -> Verdict:
    """Return what an error says of kernels: of the compiler, the driver or the GPU."""
    if isinstance(error, CompilerError):
        return Verdict({}, str(error))
    short_of_memory = isinstance(error, torch.cuda.OutOfMemoryError)
    return Verdict({}, str(error).partition("\n")[0], short_of_memory)


def judge(errors: dict[str, float], tolerance: float, theirs: str) -> Verdict:
    """Return what errors say of kernels.

    Args:
        errors: of the results by name, of :func:`largest_error`.
        tolerance: the largest that rounding makes.
        theirs: what the results are compared with.
    """
    worst = max(errors, key=errors.get)
    if errors[worst] <= tolerance:
        return Verdict(errors)
    error = f"{errors[worst]:.2g} of its largest value"
    return Verdict(errors, f"{worst} differs from {theirs} by {error}")


def largest_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference of two results, of the largest value of the second or of 1."""
    error = (ours.to(theirs.dtype) - theirs).abs().max() / theirs.abs().max().clamp(min=1)
    return float(error.nan_to_num(torch.inf))


def largest_errors(
    names: Iterable[str], ours: Iterable[Tensor], theirs: Iterable[Tensor]
) -> dict[str, float]:
    """Return :func:`largest_error` of results by their names."""
    compared = zip(names, ours, theirs, strict=True)
    return {name: largest_error(one, other) for name, one, other in compared}


_problems: dict[tuple[object, ...], str | None] = {}


def problem_of(key: tuple[object, ...], check: Callable[[], str | None]) -> str | None:
    """Return what a check in this process has found wrong, or None; it is made at the first call.

    ``SASA_DET_SELF_CHECK=0`` leaves it out, and so does a CUDA graph that is captured before it was
    made.

    Args:
        key: what is checked, and for which device and types.
        check: makes it.
    """
    if os.environ.get(CHECK_VARIABLE) == "0":
        return None
    if key not in _problems:
        if torch.cuda.is_current_stream_capturing():
            return None
        _problems[key] = check()
    return _problems[key]


@contextmanager
def outside_of_forward() -> Iterator[None]:
    """Run a check in the middle of a model's forward pass, whatever surrounds that.

    Inference mode has no gradients, activation checkpointing counts the tensors that are saved, and
    whoever debugs a model wants to know of its own waits and gradients.
    """
    with (
        torch.inference_mode(False),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        torch.autograd.set_detect_anomaly(False),
        _waits_allowed(),
    ):
        yield


@contextmanager
def _waits_allowed() -> Iterator[None]:
    if not torch.cuda.is_initialized():
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def first_use_problem(
    what: str, errors: Callable[[], dict[str, float]], tolerance: float, theirs: str
) -> str | None:
    """Check kernels in this process; return what is wrong, or None, and warn of it.

    Args:
        what: uses the kernels.
        errors: runs and compares them.
        tolerance, theirs: as of :func:`judge`.
    """
    try:
        with outside_of_forward():
            verdict = judge(errors(), tolerance, theirs)
    except RuntimeError as error:
        verdict = _verdict_of_error(error)
    if verdict.problem:
        problem = verdict.problem.rstrip(".")
        logger.warning("%s does not use its CUDA kernels: %s.", what, problem)
    return verdict.problem


def draw(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw float32 numbers on the CPU, whatever PyTorch's default type and device are."""
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def errors_of(variant: Variant, device: torch.device) -> dict[str, float]:
    """Run the kernels on a small image, with parts of tiles and of groups of heads.

    Args:
        variant: what to compile them for.
        device: where to run them.

    Returns:
        dict[str, float]: the largest error of each result, of its largest value or of 1.
    """
    from . import cuda, cuda_layer

    heads = variant.heads_of_block + 1
    generator = torch.Generator().manual_seed(0)
    shape = (2, heads * variant.head_width, 11, 19)
    grad, *images = (draw(shape, generator).to(device, variant.dtype) for _ in range(4))
    shape = (heads, variant.head_width // 2, variant.kernel_size)
    embeddings = [draw(shape, generator).to(device) for _ in range(2)]
    if not variant.content:
        images[1] = None
    if not variant.position:
        embeddings = [None, None]
    options = (variant.kernel_size, heads, variant.mask)
    inputs = (*images, *embeddings)
    if variant.pooled:
        return {LAYER: pooled_error(variant, grad, inputs)}
    output, log_sum = cuda.forward(*inputs, *options)
    actual = [output, *cuda.backward(grad, *inputs, log_sum, *options)]
    exact = [None if x is None else x.float() for x in inputs]
    output, log_sum = loop.forward(*exact, *options)
    expected = [output, *loop.backward(grad.float(), *exact, log_sum, *options)]
    compared = zip(RESULTS, actual, expected, strict=True)
    errors = {name: largest_error(*pair) for name, *pair in compared if pair[1].numel() > 0}
    if cuda_layer.is_there(device):
        errors[LAYER] = layer_error(variant, grad, inputs, expected)
    return errors


def pooled_error(variant: Variant, image: Tensor, inputs: Sequence[Tensor | None]) -> float:
    """Run a layer that pools; return the largest error of its results.

    Args:
        variant: of the kernels.
        image: (N, C, H, W), of which the gradient of the output is made.
        inputs: query, key, value and both embeddings, None for what the variant does not have.
    """
    options = (variant.kernel_size, image.shape[1] // variant.head_width, variant.mask)
    exact = [None if x is None else x.float() for x in inputs]
    output, log_sum = loop.forward(*exact, *options)
    with torch.enable_grad():
        pooled = avg_pool_rounding_up(output.requires_grad_(), 2)
        grad = image[..., : pooled.shape[2], : pooled.shape[3]]
        (whole,) = torch.autograd.grad(pooled, output, grad.float())
    gradients = loop.backward(whole, *exact, log_sum, *options)
    return layer_error(variant, grad, inputs, [pooled.detach(), *gradients], most_levels=1)


def layer_error(
    variant: Variant,
    grad: Tensor,
    inputs: Sequence[Tensor | None],
    expected: Sequence[Tensor],
    most_levels: int = 2,
) -> float:
    """Run a layer that starts the kernels from C++, alone and on the second of two levels.

    Args:
        variant: of the kernels.
        grad: of the output.
        inputs: query, key, value and both embeddings, None for what the variant does not have.
        expected: output and gradients, empty for what the variant does not have.
        most_levels: up to how many levels to run it as one of.

    Returns:
        float: the largest error of its results.
    """
    from . import cuda_layer

    *images, rows, cols = inputs
    images = [x for x in images if x is not None]
    channels = grad.shape[1]
    # Projections that pick queries, keys and values out of an input that has them all.
    weights = torch.eye(len(images) * channels, dtype=torch.float32, device=grad.device)
    weights = weights[:, :, None, None]
    errors = []
    for num_levels in range(1, most_levels + 1):
        with torch.enable_grad():
            x = torch.cat(images, 1).requires_grad_()
            embeddings = [e if e is None else e.clone().requires_grad_() for e in (rows, cols)]
            layer = (weights.split(channels), [], *embeddings, channels // variant.head_width)
            if num_levels == 1:
                output = cuda_layer.attend(x, *layer, variant)
            else:
                # Behind a level that is wider, and has more tiles in a row.
                first = torch.cat([x, x], 3)[:, :, :5].detach()
                pixels, maps = join([2 * first, x])
                output = split(cuda_layer.attend(pixels, *layer, variant, maps), maps)[1]
            leaves = [x, *(e for e in embeddings if e is not None)]
            of_x, *others = torch.autograd.grad(output, leaves, grad)
        actual = [output.detach(), *of_x.split(channels, 1), *others]
        present = [x for x in expected if x.numel() > 0]
        errors += map(largest_error, actual, present)
    return max(errors)

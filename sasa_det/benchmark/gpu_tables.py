"""What was measured on a GPU, as JSON and as Markdown."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from ..ops.cuda_check import LAYER, RESULTS
from ..ops.cuda_compiler import Resources
from ..ops.gpu_prediction import WHOLE, Gpu, Times
from ..utils.text import markdown_table

CONVOLUTION, ATTENTION = "convolution", "attention"
_NONE = ""


@dataclass(frozen=True)
class Errors:
    """The errors of a variant of the kernels, of the largest value of each result."""

    dtype: str
    head_width: int
    kernel_size: int
    options: str
    errors: dict[str, float]
    problem: str | None = None


@dataclass(frozen=True)
class Comparison:
    """The largest error of something that runs on the GPU.

    Attributes:
        what: what runs.
        theirs: what it is compared with.
        error: of the largest value of each result, or of 1.
        problem: what is wrong, or None.
    """

    what: str
    theirs: str
    error: float
    problem: str | None = None


@dataclass(frozen=True)
class Ceilings:
    """What the GPU reaches at best: bytes read and written, and FLOPs in bfloat16, per second."""

    copy: float
    product: float


@dataclass(frozen=True)
class Row:
    """The time of one way to do something.

    Attributes:
        what: a layer, such as "256@80", or a model.
        way: what it is done with.
        forward: seconds without gradients; None if it was not measured.
        step: seconds of forward and backward pass.
        count: how often the model has the layer.
        why_not: why a time is missing.
    """

    what: str
    way: str
    forward: float | None
    step: float | None
    count: int = 1
    why_not: str | None = None


@dataclass(frozen=True)
class Choice:
    """The time of one of the choices that there are for a kernel.

    Attributes:
        kernel: "forward", "query" or "key".
        what: the layer that it is timed in, such as "256@80".
        split: of a block's tile, and blocks that an SM is to hold.
        in_use: whether layers use it.
        taken: registers and spilled bytes of a thread; None, like the next, if it was not measured.
        seconds: of a call.
        why_not: why it was not.
    """

    kernel: str
    what: str
    split: str
    in_use: bool
    taken: Resources | None
    seconds: float | None
    why_not: str | None = None


@dataclass
class Measured:
    """All that was measured.

    Attributes:
        machine: the GPU, versions and the date.
        backend: of local_attention, that ran in the layers; empty until it is known.
        errors, ceilings, layers, comparisons, models, choices: see the classes; ceilings are None
            until measured.
        notes: sentences on what was left out, and on what failed.
        seconds: that each part took.
    """

    machine: str
    backend: str = ""
    errors: list[Errors] = field(default_factory=list)
    ceilings: Ceilings | None = None
    layers: list[Row] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    models: list[Row] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


Predicted = Mapping[str, tuple[Times, Times]]


def as_json(measured: Measured, predicted: Predicted) -> str:
    """Return everything as JSON, times in seconds."""
    record = asdict(measured)
    record["predicted"] = {
        name: {CONVOLUTION: asdict(conv), ATTENTION: asdict(attn)}
        for name, (conv, attn) in predicted.items()
    }
    return json.dumps(record, indent=2)


def as_markdown(measured: Measured, predicted: Predicted, gpu: Gpu | None) -> str:
    """Return tables and what they mean.

    Args:
        measured: what there is so far.
        predicted: see :func:`sasa_det.ops.gpu_report.predict`; empty if nothing is predicted.
        gpu: what was predicted for, or None.
    """
    parts = [f"{measured.machine}."]
    if measured.backend:
        parts[0] += f" Attention ran on the backend `{measured.backend}`."
    if measured.errors:
        parts += [_ERRORS, markdown_table([_errors_row(x) for x in measured.errors])]
    if measured.ceilings:
        parts.append(_ceilings_text(measured.ceilings, gpu))
    if measured.layers:
        parts += [_LAYERS, layers_table(measured.layers, predicted)]
    if measured.comparisons:
        parts += [_COMPARISONS, markdown_table([_comparison_row(x) for x in measured.comparisons])]
    if measured.models:
        parts += [_MODELS, models_table(measured.models)]
    if measured.choices:
        parts += [_CHOICES, choices_table(measured.choices)]
    rows = measured.layers + measured.models
    missing = [f"- {row.what}, {row.way}: {row.why_not}" for row in rows if row.why_not]
    missing += [
        f"- {x.what}, {x.kernel} with {x.split}: {x.why_not}" for x in measured.choices if x.why_not
    ]
    if missing:
        parts += ["Not measured:", "\n".join(missing)]
    return "\n\n".join([*parts, *measured.notes]) + "\n"


_ERRORS = (
    "Largest errors of each result against the loop backend in float32, of the result's largest "
    "value:"
)
_COMPARISONS = "Largest errors of other pieces, of the largest value of each result:"
_LAYERS = (
    "Microseconds, forward / forward and backward, bfloat16, batch 8; attention with the products "
    "of its projections. Medians of CUDA-graph replays, whose tensors are not in the cache. Ratios "
    "are those of attention to convolution:"
)
_MODELS = (
    "Milliseconds, forward / forward and backward, of backbone, FPN and heads of RetinaNet-50 with "
    "8 images of 640 x 640 under autocast in bfloat16, without losses and boxes, as CUDA graphs:"
)
_CHOICES = (
    "Microseconds of the kernels alone, with one or two parts of 16 pixels for a warp and several "
    "numbers of blocks for an SM, bfloat16, batch 8. Layers use the first choice of each:"
)


def _errors_row(errors: Errors) -> dict[str, str]:
    cells = {
        "type": errors.dtype,
        "head width": str(errors.head_width),
        "kernel size": str(errors.kernel_size),
        "with": errors.options,
    }
    for name in (*RESULTS, LAYER):
        cells[name] = f"{errors.errors[name]:.1e}" if name in errors.errors else _NONE
    return {**cells, "problem": errors.problem or "none"}


def _comparison_row(comparison: Comparison) -> dict[str, str]:
    return {
        "piece": comparison.what,
        "against": comparison.theirs,
        "error": f"{comparison.error:.1e}",
        "problem": comparison.problem or "none",
    }


def _ceilings_text(ceilings: Ceilings, gpu: Gpu | None) -> str:
    assumed = (
        ("", "")
        if gpu is None
        else (
            f" (predictions assume {gpu.bandwidth / 1e12:.2f})",
            f" (predictions assume {gpu.product / 1e12:.0f})",
        )
    )
    return (
        f"Measured ceilings: a copy reads and writes {ceilings.copy / 1e12:.2f} TB/s{assumed[0]}, "
        f"a product in bfloat16 reaches {ceilings.product / 1e12:.0f} TFLOP/s{assumed[1]}."
    )


def layers_table(rows: Sequence[Row], predicted: Predicted) -> str:
    """Return a table with a row for each layer, and one for all as often as they occur.

    Args:
        rows: of all layers and ways.
        predicted: as of :func:`as_markdown`.
    """
    ways = list(dict.fromkeys(row.way for row in rows))
    layers = dict.fromkeys(row.what for row in rows)
    counts = {row.what: row.count for row in rows}
    by_way = {way: {row.what: row for row in rows if row.way == way} for way in ways}
    if len(layers) > 1:
        for way in ways:
            by_way[way][WHOLE] = _total(way, [by_way[way].get(x) for x in layers])
        layers[WHOLE], counts[WHOLE] = None, 1
    table = []
    for layer in layers:
        times = {way: by_way[way].get(layer) for way in ways}
        cells = {"layer": layer, "times": str(counts[layer])}
        for way in (CONVOLUTION, ATTENTION):
            cells[way] = _cell(times.get(way), 1e6)
        cells["ratio"] = _ratios(times.get(ATTENTION), times.get(CONVOLUTION))
        if predicted:
            conv, attn = predicted.get(layer, (None, None))
            for way, time in ((CONVOLUTION, conv), (ATTENTION, attn)):
                cells[f"{way}, predicted"] = _cell(_as_row(time), 1e6)
            cells["ratio, predicted"] = _ratios(_as_row(attn), _as_row(conv))
        others = [way for way in ways if way not in (CONVOLUTION, ATTENTION)]
        table.append({**cells, **{way: _cell(times[way], 1e6) for way in others}})
    return markdown_table(table)


def models_table(rows: Sequence[Row]) -> str:
    """Return a table with a row for each model; ratios are to the first one."""
    first = rows[0]
    table = [
        {"model": row.what, "ms": _cell(row, 1e3, ".2f"), "ratio": _ratios(row, first)}
        for row in rows
    ]
    return markdown_table(table)


def choices_table(rows: Sequence[Choice]) -> str:
    """Return a table with a row for each kernel and layer, and a choice's facts in each cell.

    Args:
        rows: of all kernels, the choice in use before the others.
    """
    by_kernel: dict[tuple[str, str], list[Choice]] = {}
    for row in rows:
        by_kernel.setdefault((row.kernel, row.what), []).append(row)
    table = []
    for (kernel, what), choices in by_kernel.items():
        timed = [x for x in choices if x.seconds is not None]
        fastest = min(timed, key=lambda x: x.seconds, default=None)
        cells = {"kernel": kernel, "layer": what}
        for name, choice in zip(_ORDINALS, choices, strict=False):
            cells[name] = f"? ({choice.split})"
            if choice.taken and choice.seconds is not None:
                registers, spilled = choice.taken.registers, choice.taken.spill_bytes
                facts = f"{choice.split}, {registers} registers, {spilled} bytes spilled"
                cells[name] = f"{1e6 * choice.seconds:.0f} ({facts})"
        in_use = next((x for x in timed if x.in_use), None)
        cells["fastest"] = _NONE if fastest is None else fastest.split
        if fastest and in_use:
            cells["of the one in use"] = f"{fastest.seconds / in_use.seconds:.2f}"
        table.append(cells)
    columns = dict.fromkeys(name for cells in table for name in cells)
    return markdown_table([{x: cells.get(x, _NONE) for x in columns} for cells in table])


_ORDINALS = ("in use", "second choice", "third choice")


def _total(way: str, rows: Sequence[Row | None]) -> Row:
    """Sum a way's times over all layers; what is missing of one of them is missing of all."""

    def total(name: str) -> float | None:
        times = [None if row is None else getattr(row, name) for row in rows]
        if None in times:
            return None
        return sum(row.count * time for row, time in zip(rows, times, strict=True))

    return Row(WHOLE, way, total("forward"), total("step"))


def _as_row(times: Times | None) -> Row | None:
    return None if times is None else Row("", "", times.forward, times.step)


def _cell(row: Row | None, factor: float, form: str = ".0f") -> str:
    times = (None, None) if row is None else (row.forward, row.step)
    if times == (None, None):
        return _NONE
    return " / ".join("?" if time is None else format(factor * time, form) for time in times)


def _ratios(row: Row | None, to: Row | None) -> str:
    if row is None or to is None:
        return _NONE
    pairs = ((row.forward, to.forward), (row.step, to.step))
    if None in (pairs[0] + pairs[1]):
        return _NONE
    return " / ".join(f"{ours / theirs:.2f}" for ours, theirs in pairs)

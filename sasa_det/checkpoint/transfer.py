"""Which weights of a checkpoint a model's backbone can take, and what becomes of the others."""

import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn

from ..errors import CheckpointError, TransferError
from ..layers import AttentionStem
from ..modeling.backbone import AttentionBottleneckBlock
from ..utils.text import abbreviated_list
from .layouts import Layout
from .matching import OPTIONAL, backbone_names

# Some reasons for which weights of the source are dropped, and those of the target missing.
_NO_PLACE = "no such weight in the target"
_NO_PART = "not a part of a plain ResNet or SAN"
_NO_STATISTICS = "the target's norm keeps no statistics"
_COUNTED = "counted by the model itself"
_ATTENTION = "attention has no counterpart in a convolutional network"
_NOT_THERE = "not in the source"
# Those with which something is wrong.
_WRONG = (_NO_PART, _NO_PLACE, _NO_STATISTICS, _NOT_THERE)

# Names that a sentence lists; the report has all.
_MOST = 5


@dataclass(frozen=True)
class Report:
    """What became of every weight of a source and of a target, each of which is in one place.

    Attributes:
        loaded: by name in the target, the name in the source.
        dropped: by name in the source, why; what the source holds beside weights is among them.
        missing: by name in the target, why.
        mismatched: by name in the target, the name in the source and how their shapes differ.
        weights_allow: what a run has to allow that starts from the result, as ``allow`` of
            :class:`~sasa_det.checkpoint.Checkpointer`, since weights are missing.
        preprocessing: of the images that the weights are for; None if it is unknown.
    """

    loaded: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    mismatched: dict[str, tuple[str, str]] = field(default_factory=dict)
    weights_allow: tuple[str, ...] = ()
    preprocessing: dict[str, Any] | None = None

    def __str__(self) -> str:
        rows = [
            *(("loaded", source, target, "") for target, source in self.loaded.items()),
            *(("dropped", source, "", why) for source, why in self.dropped.items()),
            *(("missing", "", target, why) for target, why in self.missing.items()),
            *(("shape", source, target, how) for target, (source, how) in self.mismatched.items()),
        ]
        preprocessing = "unknown, since the source does not say it"
        if self.preprocessing is not None:
            preprocessing = "{format}, {pixel_mean}, {pixel_std}".format(**self.preprocessing)
        lines = [
            tabulate(rows, ("", "source", "target", ""), "github", disable_numparse=True),
            f"{len(self.loaded)} loaded, {len(self.dropped)} dropped, {len(self.missing)} missing, "
            f"{len(self.mismatched)} of another shape.",
            f"Preprocessing: {preprocessing}.",
        ]
        if self.weights_allow:
            lines.append(
                "To start from these incomplete weights, a run needs MODEL.WEIGHTS_ALLOW "
                f'"{list(self.weights_allow)}", or train.weights_allow with the same list in a '
                "LazyConfig."
            )
        return "\n".join(lines)


def transfer(
    weights: Mapping[str, Tensor], layout: Layout, model: nn.Module, allow: Sequence[str] = ()
) -> Report:
    """Find the place of every weight of a checkpoint in the backbone of a model.

    The model's classifier, where its backbone has one, is not filled.

    Args:
        weights: of the checkpoint, by name.
        layout: of the names.
        model: whose backbone is to be filled, or a backbone alone; it stays as it is.
        allow: shell patterns of names in the target that may be missing or of another shape, and
            of names in the source that may be dropped though they are a part of its network.

    Returns:
        Report: names in the target are those of the backbone alone.

    Raises:
        TransferError: if other weights than those are missing, of another shape or left over.
        CheckpointError: if nothing fits, or a pattern matches nothing.
    """
    state = model.state_dict()
    shapes = {
        name: state[key].shape
        for key, name in backbone_names(state).items()
        if not name.startswith("linear.")
    }
    for pattern in allow:
        if not fnmatch.filter([*shapes, *weights], pattern):
            raise CheckpointError(
                f"the pattern {pattern!r} of --allow matches no weight of source or target"
            )
    attention = _instead_of_convolution(model, state) if layout.convolutional else ()
    if layout.convolutional:
        _check_strides(model)
    names, bare = layout.rename(weights), layout.bare(weights)
    report = Report()
    loaded, dropped, mismatched = report.loaded, report.dropped, report.mismatched
    for source, weight in weights.items():
        name = names.get(source)
        if (name or bare.get(source, "")).startswith("linear."):
            dropped[source] = "classifier"
        elif name is None:
            dropped[source] = (
                _NO_PART if layout.foreign and source in bare else "outside the backbone"
            )
        elif name not in shapes:
            dropped[source] = _why_no_place(name, shapes, attention)
        elif name in loaded or name in mismatched:
            raise CheckpointError(f"several of its weights, {source} among them, are {name}")
        elif weight.shape != shapes[name]:
            how = f"{tuple(weight.shape)} in the source, {tuple(shapes[name])} in the target"
            mismatched[name] = (source, how)
        else:
            loaded[name] = source
    needed = set()
    for name in shapes:
        if name in loaded or name in mismatched:
            continue
        place = next((beginning for beginning in attention if name.startswith(beginning)), None)
        if _is_optional(name):
            report.missing[name] = _COUNTED
        elif place is None:
            report.missing[name] = _NOT_THERE
        else:
            report.missing[name] = _ATTENTION
            # All weights at such a place, in whatever stage and block.
            needed.add(f"*.{re.sub(r'[0-9]', '?', place)}*")
    reasons = {**dropped, **report.missing}
    wrong = {name for name, why in reasons.items() if why in _WRONG} | mismatched.keys()
    allowed = {pattern: set(fnmatch.filter(wrong, pattern)) for pattern in allow}
    needed |= {f"*{p}" for p, names in allowed.items() if names - dropped.keys()}
    report = replace(report, weights_allow=tuple(sorted(needed)))
    if not loaded:
        raise TransferError(
            f"none of its {len(weights)} weights ({abbreviated_list(sorted(weights), 3)}) fits the "
            f"target's backbone ({abbreviated_list(sorted(shapes), 3)})",
            report,
        )
    refused = wrong.difference(*allowed.values())
    if refused:
        raise TransferError(_refusal(refused, report), report)
    return report


def _refusal(refused: Collection[str], report: Report) -> str:
    lacking = sorted(refused & report.missing.keys())
    other = sorted(refused & report.mismatched.keys())
    left = sorted(refused & report.dropped.keys())
    reasons = []
    if lacking:
        reasons.append(f"it has no {abbreviated_list(lacking, _MOST)}")
    if other:
        shapes = [f"{name} ({report.mismatched[name][1]})" for name in other]
        reasons.append(f"it has other shapes for {abbreviated_list(shapes, _MOST)}")
    if left:
        reasons.append(f"the target has no place for {abbreviated_list(left, _MOST)}")
    return (
        f"{' and '.join(reasons)}; what is to be left out must be named with --allow, as in "
        f"--allow '{[*lacking, *other, *left][0]}'"
    )


def _why_no_place(name: str, shapes: Collection[str], attention: tuple[str, ...]) -> str:
    stage, module, kind = name.partition(".")[0], *name.rpartition(".")[::2]
    if not any(known.startswith(f"{stage}.") for known in shapes):
        return "no such stage in the target"
    if _is_optional(name):
        return _COUNTED
    if kind in ("running_mean", "running_var") and f"{module}.weight" in shapes:
        return _NO_STATISTICS
    return "attention takes its place" if name.startswith(attention) else _NO_PLACE


def _is_optional(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in OPTIONAL)


def _instead_of_convolution(model: nn.Module, state: Collection[str]) -> tuple[str, ...]:
    """List the beginnings of names under which a backbone has attention, a ResNet convolution."""
    modules = dict(model.named_modules())
    # By the way that leads to them, a module's name is a beginning of those of its weights.
    names = backbone_names([*state, *modules])
    beginnings = []
    for key, module in modules.items():
        if isinstance(module, AttentionStem) and key in names:
            beginnings.append(f"{names[key]}.")
        if isinstance(module, AttentionBottleneckBlock) and key in names:
            beginnings += [f"{names[key]}.{part}." for part in ("attention", "norm", "conv2")]
    return tuple(beginnings)


def _check_strides(model: nn.Module) -> None:
    for name, module in model.named_modules():
        strided = getattr(module, "stride", 1) not in (1, (1, 1))
        if strided and re.search(r"\bres\d\.\d+\.conv1$", name):
            raise CheckpointError(
                f"its stages have their strides in 3x3 convolutions, the target's in 1x1 ones, "
                f"as in {name}; set MODEL.RESNETS.STRIDE_IN_1X1 False"
            )

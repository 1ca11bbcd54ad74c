"""Which weights of a model a checkpoint fills, and which it may leave as they are."""

import fnmatch
import logging
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from detectron2.checkpoint.c2_model_loading import (
    align_and_update_state_dicts,
    convert_c2_detectron_names,
)
from fvcore.common.checkpoint import _IncompatibleKeys

from ..errors import CheckpointError
from ..utils.text import abbreviated_list
from .prefixes import named_as

logger = logging.getLogger(__name__)

# What old files lack and the model has from its config, or counts for itself.
OPTIONAL = ("*num_batches_tracked", "pixel_mean", "pixel_std", "*anchor_generator.cell_anchors*")

# detectron2's C4 models keep the backbone's last stage in their RoI head.
_HEAD = "roi_heads."
_STAGE_IN_HEAD = f"{_HEAD}res5."
_BACKBONE = "backbone."
# A ResNet that classifies has its classifier beside its stages.
_CLASSIFIER = f"{_BACKBONE}linear.*"

# Where a run gets ``allow`` from.
_ALLOW = "allow (MODEL.WEIGHTS_ALLOW, or train.weights_allow in a LazyConfig)"

# Keys that a sentence names; the log has all.
_shorten = partial(abbreviated_list, most=3)


def align_names(model: dict[str, torch.Tensor], checkpoint: dict[str, Any]) -> None:
    """Give a checkpoint's weights the model's names, by detectron2's heuristics if it asks so.

    Wrappers of modules, and a prefix of all names, are seen through in any case.

    Args:
        model: the model's state dict.
        checkpoint: what :func:`read_checkpoint` returns, changed in place; its weights get the name
            of the model's that ends with theirs.

    Raises:
        CheckpointError: if a weight could be several of the model's.
    """
    checkpoint["model"] = named_as(model, checkpoint["model"])
    if not checkpoint.pop("matching_heuristics", False):
        return
    weights = checkpoint["model"]
    if checkpoint.get("__author__") == "Caffe2":
        weights, _ = convert_c2_detectron_names(weights)
    try:
        aligned = align_and_update_state_dicts(model, weights, c2_conversion=False)
    except ValueError as error:
        raise CheckpointError(f"the names of its weights are ambiguous ({error})") from error
    # A weight of another shape is left there under its own name, where nobody would miss it.
    for key in sorted(model.keys() - aligned.keys()):
        ends = (key.split(".", n)[-1] for n in range(key.count(".") + 1))
        end = next((end for end in ends if end in aligned and end not in model), None)
        if end is not None and aligned[end].shape != model[key].shape:
            aligned[key] = aligned.pop(end)
    checkpoint["model"] = aligned


def named_by_ends(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Name a model's weights without what it puts before those of its backbone.

    A detector may put something else there, ``backbone.bottom_up.`` where it has an FPN, and
    detectron2's heuristics match a name with all that end with it.

    Args:
        weights: by name in the model.
    """
    return {name.removeprefix(_BACKBONE): weight for name, weight in weights.items()}


def backbone_names(model: Collection[str]) -> dict[str, str]:
    """Name the weights of a model's backbone as they are named in the backbone alone.

    Args:
        model: names of the model's weights.

    Returns:
        dict: by the names that the model's backbone has, those without what the model puts before
        them; all names where no weight is in a backbone.
    """
    prefix, *_ = prefixes = _backbone_prefixes(model)
    return {
        key: key.removeprefix(prefix if key.startswith(prefix) else _HEAD)
        for key in model
        if key.startswith(prefixes)
    }


def check_filled(
    model: Collection[str],
    weights: Collection[str],
    incompatible: _IncompatibleKeys,
    *,
    strict: bool,
    allow: Iterable[str] = (),
) -> None:
    """Check that a checkpoint fills the weights of a model that it has to.

    Everything has to be filled if ``strict``. Otherwise, where all weights of the model that the
    checkpoint has are in the backbone (its bottom-up part, where there is an FPN), it has to fill
    the backbone alone; else, as a detector, everything. ``allow`` adds exceptions.

    Args:
        model: names of the model's weights.
        weights: names of the checkpoint's weights but for those of another shape than the model's.
        incompatible: what loading the checkpoint returned.
        strict: whether to take no exceptions.
        allow: shell patterns of names that may be missing or of another shape.

    Raises:
        CheckpointError: naming some of those that are not filled, without the name of the file; the
            log names all.
    """
    known = set(model)
    mismatched = [key for key, _, _ in incompatible.incorrect_shapes]
    found = [*weights, *mismatched]
    both = known.intersection(found)
    if not strict:
        _check_places(known, found)
    if mismatched and both == set(mismatched):
        raise CheckpointError(
            f"all weights that it has for the model have other shapes: {_shorten(mismatched)}"
        )
    if not both:
        raise CheckpointError(
            f"none of its {len(found)} weights ({_shorten(sorted(found))}) is one of the model's "
            f"{len(known)} ({_shorten(sorted(known))}); with ?matching_heuristics=True after its "
            "name, names are matched by their ends"
        )
    unfilled = {*incompatible.missing_keys, *mismatched}
    optional = list(OPTIONAL)
    if not strict:
        for pattern in allow:
            if not fnmatch.filter(known, pattern):
                raise CheckpointError(
                    f"the pattern {pattern!r} of {_ALLOW} matches no weight of the model"
                )
            optional.append(pattern)
        backbone = _backbone_prefixes(known)
        if all(key.startswith(backbone) for key in both):
            unfilled = {key for key in unfilled if key.startswith(backbone)}
            optional.append(_CLASSIFIER)
    refused = sorted(unfilled.difference(*(fnmatch.filter(unfilled, p) for p in optional)))
    if not refused:
        return
    lacking = [key for key in refused if key not in mismatched]
    other = [key for key in refused if key in mismatched]
    for what, keys in (("not in the checkpoint", lacking), ("of another shape there", other)):
        if keys:
            logger.error("Weights of the model %s: %s", what, ", ".join(keys))
    reasons = [f"has no {_shorten(lacking)}"] if lacking else []
    reasons += [f"has other shapes for {_shorten(other)}"] if other else []
    module = min(key.rpartition(".")[0] for key in refused)
    advice = (
        "every weight must be there"
        if strict
        else f"weights that may stay as they are initialized must be named in {_ALLOW}, "
        f"as in \"['{module}.*']\""
    )
    raise CheckpointError(f"it {' and '.join(reasons)}; {advice}")


def _check_places(known: set[str], found: Collection[str]) -> None:
    """Refuse the backbone of another kind of model, whose names have another beginning."""
    lacking = {bare: key for key, bare in backbone_names(known).items() if key not in found}
    for key, bare in backbone_names(found).items():
        if bare in lacking and bare != key:
            raise CheckpointError(
                f"its backbone's weights have other names ({key} is the model's {lacking[bare]}): "
                "convert it with sasa-det convert-checkpoint first"
            )


def _backbone_prefixes(model: Iterable[str]) -> tuple[str, ...]:
    for prefix in (f"{_BACKBONE}bottom_up.", _BACKBONE):
        if any(key.startswith(prefix) for key in model):
            return prefix, _STAGE_IN_HEAD
    return ("",)

"""Checks of the values of a config."""

import logging
import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from detectron2.config import CfgNode, get_cfg

from ..config import add_sasa_config
from .config_keys import flatten
from .config_rules import (
    EXAMPLES,
    INCREASING,
    MAY_BE_FLAT,
    MAY_BE_INFINITE,
    MAY_BE_NONE,
    NOT_EMPTY,
    RULES,
    Rule,
)
from .errors import UsageError, nearest

__all__ = ["check_schedule", "check_values", "warn_of_slow_averages"]

logger = logging.getLogger(__name__)

_KINDS = {bool: "truth value", int: "number", float: "number", str: "string"}


def check_values(cfg: CfgNode) -> None:
    """Check every value of a config against what its key allows.

    Args:
        cfg: a config with sasa_det's keys.

    Raises:
        UsageError: in one sentence that names the key, its value and what is allowed.
    """
    values = flatten(cfg)
    defaults = get_cfg()
    add_sasa_config(defaults)
    for key, default in flatten(defaults).items():
        if key not in values:
            raise UsageError(f"{key} must be a value, got a section of keys.")
        value = values[key]
        for part in _parts(value):
            _check_plain(key, part)
        _check_kind(key, value, default)
        for rule, keys in RULES.items():
            if _is_among(key, keys):
                _check_rule(key, value, rule)
        nested = value if isinstance(value, list | tuple) else ()
        is_empty = not value or any(part in ([], ()) for part in nested)
        if is_empty and _is_among(key, NOT_EMPTY):
            raise UsageError(f"{key} must hold at least one value, got {value!r}.")
        if _is_among(key, INCREASING) and any(a >= b for a, b in pairwise(value)):
            raise UsageError(f"the values of {key} must increase, got {value!r}.")
    _check_lengths(values)
    patience = cfg.TEST.EARLY_STOPPING
    if patience and not cfg.TEST.BEST_METRIC:
        raise UsageError(f"TEST.EARLY_STOPPING must be 0 without TEST.BEST_METRIC, got {patience}.")


def check_schedule(cfg: CfgNode) -> None:
    """Check that warmup, steps and end of the learning rate fit the run.

    Args:
        cfg: a config with sasa_det's keys. Lengths in epochs are compared with lengths in epochs,
            and those in iterations with those in iterations.

    Raises:
        UsageError: in one sentence that names the key, its value and what is allowed.
    """
    solver = cfg.SOLVER
    in_epochs = solver.MAX_EPOCHS > 0
    total = "MAX_EPOCHS" if in_epochs else "MAX_ITER"
    lengths = {"WARMUP_EPOCHS": "WARMUP_ITERS"}
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        lengths["STEP_EPOCHS"] = "STEPS"
    for epochs, iterations in lengths.items():
        if in_epochs != bool(solver[epochs]):
            continue
        key = epochs if in_epochs else iterations
        if any(part >= solver[total] for part in _parts(solver[key])):
            raise UsageError(
                f"SOLVER.{key} must be below SOLVER.{total}, which is {solver[total]}, got "
                f"{solver[key]}."
            )
    # Later detectron2 lets the cosine end above 0.
    if (
        solver.LR_SCHEDULER_NAME == "WarmupCosineLR"
        and solver.get("BASE_LR_END", 0) > solver.BASE_LR
    ):
        raise UsageError(
            f"SOLVER.BASE_LR_END must be at most SOLVER.BASE_LR, which is {solver.BASE_LR}, got "
            f"{solver.BASE_LR_END}."
        )


def warn_of_slow_averages(cfg: CfgNode) -> None:
    """Log a warning for each moving average that a run is too short for.

    Args:
        cfg: a config with sasa_det's keys, lengths in iterations.
    """
    steps = cfg.SOLVER.MAX_ITER
    decays = {"MODEL.BN_DECAY": cfg.MODEL.BN_DECAY, "MODEL.EMA.DECAY": cfg.MODEL.EMA.DECAY}
    for key, decay in decays.items():
        if 0 < steps * (1 - decay) < 1:
            logger.warning(
                "%s %g averages over some %.0f steps and the run has %d: it will be evaluated with "
                "what it began with rather than with what it learnt; %.4g or less would do.",
                *(key, decay, 1 / (1 - decay), steps, max(0.5, 1 - 10 / steps)),
            )


def _is_among(key: str, patterns: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns.split())


def _parts(value: Any) -> Iterator[Any]:
    """Iterate over the values in nested lists, or over one value."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from _parts(part)
    else:
        yield value


def _check_plain(key: str, value: Any) -> None:
    if value is None and not _is_among(key, MAY_BE_NONE):
        raise UsageError(f"{key} must have a value, got None.")
    if not isinstance(value, (bool, int, float, str, type(None))):
        raise UsageError(f"{key} must hold numbers, strings, True and False, got {value!r}.")
    if isinstance(value, str) and "\0" in value:
        raise UsageError(f"{key} must not hold a null character, got {value!r}.")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UsageError(f"{key} must be an integer of 64 bits, got a longer one.")
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value) or not _is_among(key, MAY_BE_INFINITE):
            raise UsageError(f"{key} must be finite, got {value}.")


def _check_kind(key: str, value: Any, default: Any) -> None:
    """Check that a value nests lists as the default does, and holds numbers where it does."""
    for example, keys in EXAMPLES.items():
        if _is_among(key, keys):
            default = example
    examples = [default, default[0]] if _is_among(key, MAY_BE_FLAT) else [default]
    if default is not None and not any(_is_of_kind(value, example) for example in examples):
        raise UsageError(f"{key} must be {_describe(default)}, got {value!r}.")


def _is_of_kind(value: Any, example: Any) -> bool:
    if isinstance(example, list | tuple):
        is_list = isinstance(value, list | tuple)
        return is_list and all(_is_of_kind(part, example[0]) for part in value)
    return value is None or _KINDS.get(type(value)) == _KINDS[type(example)]


def _describe(example: Any) -> str:
    if not isinstance(example, list | tuple):
        return f"a {_KINDS[type(example)]}"
    depth, part = 1, example[0]
    while isinstance(part, list | tuple):
        depth, part = depth + 1, part[0]
    return f"a list of {'lists of ' * (depth - 1)}{_KINDS[type(part)]}s"


def _check_rule(key: str, value: Any, rule: Rule) -> None:
    for part in _parts(value):
        if part is None or rule.holds(part):
            continue
        subject = key if part is value else f"every value of {key}"
        hint = nearest(part, rule.names) if isinstance(part, str) else "."
        raise UsageError(f"{subject} must be {rule.allowed}, got {value!r}{hint}")


def _check_lengths(values: dict[str, Any]) -> None:
    """Check lists whose length other keys give."""
    channels = 1 if values["INPUT.FORMAT"] == "L" else 3
    lengths = {"INPUT.CROP.SIZE": 2, "MODEL.PIXEL_MEAN": channels, "MODEL.PIXEL_STD": channels}
    if values["INPUT.MIN_SIZE_TRAIN_SAMPLING"] == "range":
        lengths["INPUT.MIN_SIZE_TRAIN"] = 2
    for section in ("RETINANET", "ROI_HEADS", "RPN"):
        thresholds = values[f"MODEL.{section}.IOU_THRESHOLDS"]
        lengths[f"MODEL.{section}.IOU_LABELS"] = len(thresholds) + 1
    # A box has four coordinates, and an angle where it is rotated.
    rotated = {
        "MODEL.RPN": values["MODEL.PROPOSAL_GENERATOR.NAME"] == "RRPN",
        "MODEL.ROI_BOX_HEAD": values["MODEL.ROI_HEADS.NAME"] == "RROIHeads",
        "MODEL.RETINANET": False,
    }
    lengths |= {f"{section}.BBOX_REG_WEIGHTS": 4 + angle for section, angle in rotated.items()}
    for key, length in lengths.items():
        if len(values[key]) != length:
            raise UsageError(f"{key} must hold {length} values, got {values[key]!r}.")
    key = "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS"
    if any(len(weights) != 4 for weights in values[key]):
        raise UsageError(f"each list of {key} must hold 4 values, got {values[key]!r}.")

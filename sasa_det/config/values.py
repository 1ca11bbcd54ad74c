"""The values that this project's keys may have, and those keys of detectron2's that fail late."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import detectron2.solver.build
from detectron2.layers import get_norm

from ..errors import UsageError, nearest
from ..layers.local_attention import QK_NORMS
from ..ops.operator import BACKENDS
from .defaults import default_config
from .keys import flatten
from .options import RunOptions

logger = logging.getLogger(__name__)

# The name of this project's own schedule.
WARMUP_THEN_COSINE = "WarmupThenCosineLR"


class Rule(NamedTuple):
    """What a value may be.

    Attributes:
        allowed: ends the sentence "KEY must be".
        holds: tells whether a value is allowed.
        names: the allowed names, or the usual ones, if the value is a name.
    """

    allowed: str
    holds: Callable[[Any], bool]
    names: tuple[str, ...] = ()


def _number(allowed: str, holds: Callable[[float], bool]) -> Rule:
    def holds_for_a_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and holds(value)

    return Rule(allowed, holds_for_a_number)


def _one_of(*names: str) -> Rule:
    return Rule(f"one of {', '.join(names)}", lambda value: value in names, names)


def _is_norm(value: Any) -> bool:
    try:
        get_norm(value, 32)
    except KeyError:
        return False
    return True


_SCHEDULERS = ["WarmupMultiStepLR", "WarmupCosineLR", WARMUP_THEN_COSINE]

if hasattr(detectron2.solver.build, "StepWithFixedGammaParamScheduler"):
    _SCHEDULERS.append("WarmupStepWithFixedGammaLR")

# A rule, and the keys whose value it is for, or every value in their lists. Keys may be patterns,
# and some are those of one version of detectron2. Keys that are missing either follow their default
# below or are checked where the model is built from them.
RULES: dict[Rule, str] = {
    _number("within [0, 1]", lambda value: 0 <= value <= 1): """
        DATALOADER.REPEAT_THRESHOLD DATALOADER.SKIP_UNREADABLE_FRACTION
        MODEL.*.NMS_THRESH* MODEL.*.POSITIVE_FRACTION MODEL.*.SCORE_THRESH_TEST
        MODEL.PANOPTIC_FPN.COMBINE.*_THRESH
        SOLVER.WARMUP_FACTOR
    """,
    _number("above 0 and at most 1", lambda value: 0 < value <= 1): """
        INPUT.CLASSIFICATION.MIN_AREA MODEL.*.IOU_THRESHOLDS MODEL.ROI_BOX_CASCADE_HEAD.IOUS
    """,
    _number("above 0 and below 1", lambda value: 0 < value < 1): "MODEL.RETINANET.PRIOR_PROB",
    _number("at least 0 and below 1", lambda value: 0 <= value < 1): """
        DATASETS.HOLDOUT
        MODEL.ANCHOR_GENERATOR.OFFSET MODEL.BN_DECAY MODEL.CLASSIFIER.LABEL_SMOOTHING
        MODEL.EMA.DECAY SOLVER.MOMENTUM
    """,
    _number("within [0, 1], or -1 for none", lambda value: value == -1 or 0 <= value <= 1): """
        MODEL.RETINANET.FOCAL_LOSS_ALPHA
    """,
    _number("at least 1, or -1 for that of the input", lambda value: value == -1 or value >= 1): """
        MODEL.RPN.CONV_DIMS
    """,
    _number("-1, 0 or 1", lambda value: value in (-1, 0, 1)): "MODEL.*.IOU_LABELS",
    _number("a number", lambda value: True): "GLOBAL.* MODEL.PIXEL_MEAN *.IGNORE_VALUE",
    _number("odd and at least 1", lambda value: value >= 1 and value % 2 == 1): """
        MODEL.SASA.KERNEL_SIZE
    """,
    Rule(
        "empty or a backend of sasa_det.ops (cpu, triton, loop, reference)",
        lambda value: value in ("", "reference", *BACKENDS),
        ("", "reference", *BACKENDS),
    ): "MODEL.SASA.BACKEND",
    Rule(
        f"empty or one of {', '.join(QK_NORMS)}", lambda value: value in ("", *QK_NORMS), QK_NORMS
    ): "MODEL.SASA.QK_NORM",
    # The processes add their ranks to the seed, and NumPy takes 32 bits.
    _number("within [-1, 2147483647]", lambda value: -1 <= value < 2**31): "SEED",
    _number("2", lambda value: value == 2): "VERSION",
    Rule(
        "a norm of detectron2 (BN, SyncBN, FrozenBN, GN, ...) or empty",
        _is_norm,
        ("BN", "SyncBN", "FrozenBN", "GN", "LN"),
    ): "MODEL.*.NORM",
    Rule("a folder on the disk", lambda value: bool(value) and "://" not in value): "OUTPUT_DIR",
    _one_of("TrainingSampler", "RepeatFactorTrainingSampler"): "DATALOADER.SAMPLER_TRAIN",
    _one_of("relative", "relative_range", "absolute", "absolute_range"): "INPUT.CROP.TYPE",
    _one_of("BGR", "RGB", "L", "HSV", "LAB", "YCbCr", "YUV-BT.601"): "INPUT.FORMAT",
    _one_of("polygon", "bitmask"): "INPUT.MASK_FORMAT",
    _one_of("choice", "range"): "INPUT.MIN_SIZE_TRAIN_SAMPLING",
    _one_of("horizontal", "vertical", "none"): "INPUT.RANDOM_FLIP",
    _one_of("smooth_l1", "giou", "diou", "ciou"): "MODEL.*.BBOX_REG_LOSS_TYPE",
    _one_of("ROIAlign", "ROIAlignV2", "ROIAlignRotated", "ROIPool"): "MODEL.*.POOLER_TYPE",
    _one_of("sum", "avg"): "MODEL.FPN.FUSE_TYPE",
    _one_of("float16", "bfloat16"): "SOLVER.AMP.DTYPE",
    _one_of("value", "norm", "full_model"): "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
    _one_of(*_SCHEDULERS): "SOLVER.LR_SCHEDULER_NAME",
    _one_of("linear", "constant"): "SOLVER.WARMUP_METHOD",
    _one_of("max", "min"): "TEST.BEST_MODE",
}

# Other numbers follow their default: above 0, or at least 1 if it is an integer, where it is above
# 0, and at least 0 where it is 0. A default below 0 leaves them free. These may be 0 as well:
MAY_BE_ZERO = """
    DATALOADER.NUM_WORKERS
    INPUT.MIN_SIZE_*
    MODEL.*LOSS_BETA MODEL.*LOSS_WEIGHT MODEL.BACKBONE.FREEZE_AT
    MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT
    MODEL.RETINANET.FOCAL_LOSS_GAMMA MODEL.RETINANET.NUM_CONVS
    MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER
    MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    MODEL.SASA.RESIDUAL_INIT
    SOLVER.BIAS_LR_FACTOR SOLVER.NUM_DECAYS SOLVER.WARMUP_ITERS SOLVER.WEIGHT_DECAY
"""

# A value nests lists, and holds strings or numbers, as its default does. These are examples where
# the default does not show it; TEST.EXPECTED_RESULTS, with both, is checked with the metrics.
EXAMPLES = {
    ("",): """
        DATASETS.PROPOSAL_FILES_* DATASETS.TEST DATASETS.TRAIN MODEL.FPN.IN_FEATURES
        MODEL.ACTIVATION_CHECKPOINTING MODEL.WEIGHTS_ALLOW
    """,
    ((1.0,),): "MODEL.ANCHOR_GENERATOR.SIZES",
    (1.0,): "TEST.KEYPOINT_OKS_SIGMAS",
    (0.0,): "SOLVER.STEP_EPOCHS",
    0.0: "SOLVER.WEIGHT_DECAY_BIAS SOLVER.WEIGHT_DECAY_LOGIT",
    None: "TEST.EXPECTED_RESULTS",
}

# detectron2 takes one list for all levels as well.
MAY_BE_FLAT = "MODEL.ANCHOR_GENERATOR.*S"

# Lists that need a value, and lists whose values must increase.
NOT_EMPTY = """
    INPUT.MIN_SIZE_TRAIN MODEL.*.IOU_THRESHOLDS MODEL.ANCHOR_GENERATOR.*S TEST.AUG.MIN_SIZES
"""

INCREASING = "MODEL.*.IOU_THRESHOLDS SOLVER.STEPS SOLVER.STEP_EPOCHS"

# All other keys must have finite values.
MAY_BE_NONE = "SOLVER.WEIGHT_DECAY_BIAS SOLVER.WEIGHT_DECAY_LOGIT"

MAY_BE_INFINITE = "SOLVER.CLIP_GRADIENTS.NORM_TYPE"

_KINDS = {bool: "True or False", int: "number", float: "number", str: "string"}


def check_values(values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
    """Check every value of a config against what its key allows.

    Args:
        values: by yaml key, all those of sasa_det and detectron2.
        names: what the user calls a key, where that is another name.

    Raises:
        UsageError: in one sentence that names the key, its value and what is allowed.
    """
    names = names or {}
    for key, default in flatten(default_config()).items():
        if key not in values:
            raise UsageError(f"{key} must be a value, got a section of keys.")
        value, name = values[key], names.get(key, key)
        for part in _parts(value):
            _check_plain(key, name, part)
        for example, keys in EXAMPLES.items():
            if _is_among(key, keys):
                default = example
        _check_kind(key, name, value, default)
        for rule in _rules(key, default):
            _check_rule(name, value, rule)
        nested = value if isinstance(value, list | tuple) else ()
        is_empty = not value or any(part in ([], ()) for part in nested)
        if is_empty and _is_among(key, NOT_EMPTY):
            raise UsageError(f"{name} must hold at least one value, got {value!r}.")
        if _is_among(key, INCREASING) and any(a >= b for a, b in pairwise(value)):
            raise UsageError(f"the values of {name} must increase, got {value!r}.")
    _check_lengths(values)
    form, size = values["INPUT.CROP.TYPE"], values["INPUT.CROP.SIZE"]
    if values["INPUT.CROP.ENABLED"] and form.startswith("relative") and max(size) > 1:
        raise UsageError(
            f"every value of INPUT.CROP.SIZE must be at most 1 with INPUT.CROP.TYPE {form}, got "
            f"{size!r}."
        )
    patience, metric = "TEST.EARLY_STOPPING", "TEST.BEST_METRIC"
    if values[patience] and not values[metric]:
        raise UsageError(
            f"{names.get(patience, patience)} must be 0 without {names.get(metric, metric)}, got "
            f"{values[patience]}."
        )
    nesterov, momentum = "SOLVER.NESTEROV", "SOLVER.MOMENTUM"
    if values["SOLVER.OPTIMIZER"] == "SGD" and values[nesterov] and not values[momentum]:
        raise UsageError(f"{momentum} must be above 0 with {nesterov} True, got 0.")


def check_schedule(options: RunOptions) -> None:
    """Check that warmup, steps and end of the learning rate fit the run.

    Args:
        options: lengths in epochs are compared with lengths in epochs, and those in iterations with
            those in iterations.

    Raises:
        UsageError: in one sentence that names the key, its value and what is allowed.
    """
    in_epochs = options.max_epochs > 0
    total = "max_epochs" if in_epochs else "max_iter"
    lengths = {"warmup_epochs": "warmup_iters"}
    if options.lr_scheduler_name == "WarmupMultiStepLR":
        lengths["step_epochs"] = "steps"
    for epochs, iterations in lengths.items():
        if in_epochs != bool(getattr(options, epochs)):
            continue
        _check_below(options, epochs if in_epochs else iterations, total)
    if not in_epochs:
        _check_below(options, "logit_warmup_iters", total)
    if options.lr_scheduler_name == "WarmupCosineLR":
        # Later detectron2 lets the cosine end above 0.
        end = options.config.SOLVER.get("BASE_LR_END", 0)
        if end > options.base_lr:
            raise UsageError(
                f"SOLVER.BASE_LR_END must be at most SOLVER.BASE_LR, which is {options.base_lr}, "
                f"got {end}."
            )


def _check_below(options: RunOptions, field: str, total: str) -> None:
    end, value = getattr(options, total), getattr(options, field)
    if any(part >= end for part in _parts(value)):
        raise UsageError(
            f"{options.key(field)} must be below {options.key(total)}, which is {end}, got {value}."
        )


def warn_of_slow_averages(options: RunOptions) -> None:
    """Log a warning for each moving average that a run is too short for.

    Args:
        options: lengths in iterations.
    """
    steps = options.max_iter
    for field in ("bn_decay", "ema_decay"):
        decay = getattr(options, field)
        if 0 < steps * (1 - decay) < 1:
            logger.warning(
                "%s %g averages over some %.0f steps and the run has %d: it will be evaluated with "
                "what it began with rather than with what it learnt; %.4g or less would do.",
                *(options.key(field), decay, 1 / (1 - decay), steps, max(0.5, 1 - 10 / steps)),
            )


@cache  # of a few thousand pairs, which every config that is read asks for
def _is_among(key: str, patterns: str) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns.split())


def _parts(value: Any) -> Iterator[Any]:
    """Iterate over the values in nested lists, or over one value."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from _parts(part)
    else:
        yield value


def _check_plain(key: str, name: str, value: Any) -> None:
    if value is None and not _is_among(key, MAY_BE_NONE):
        raise UsageError(f"{name} must have a value, got None.")
    if not isinstance(value, (bool, int, float, str, type(None))):
        raise UsageError(f"{name} must hold numbers, strings, True and False, got {value!r}.")
    if isinstance(value, str) and "\0" in value:
        raise UsageError(f"{name} must not hold a null character, got {value!r}.")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UsageError(f"{name} must be an integer of 64 bits, got a longer one.")
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value) or not _is_among(key, MAY_BE_INFINITE):
            raise UsageError(f"{name} must be finite, got {value}.")


def _check_kind(key: str, name: str, value: Any, default: Any) -> None:
    """Check that a value nests lists as the default does, and holds numbers where it does."""
    examples = [default, default[0]] if _is_among(key, MAY_BE_FLAT) else [default]
    if type(default) is int and type(value) is not int:
        raise UsageError(f"{name} must be an integer, got {value!r}.")
    if default is not None and not any(_is_of_kind(value, example) for example in examples):
        raise UsageError(f"{name} must be {_describe(default)}, got {value!r}.")


def _is_of_kind(value: Any, example: Any) -> bool:
    if isinstance(example, list | tuple):
        is_list = isinstance(value, list | tuple)
        return is_list and all(_is_of_kind(part, example[0]) for part in value)
    return value is None or _KINDS.get(type(value)) == _KINDS[type(example)]


def _describe(example: Any) -> str:
    if isinstance(example, bool):
        return "True or False"
    if not isinstance(example, list | tuple):
        return f"a {_KINDS[type(example)]}"
    depth, part = 1, example[0]
    while isinstance(part, list | tuple):
        depth, part = depth + 1, part[0]
    kind = _KINDS[type(part)] + ("" if isinstance(part, bool) else "s")
    return f"a list of {'lists of ' * (depth - 1)}{kind}"


def _rules(key: str, default: Any) -> list[Rule]:
    """Return the rules of a key, or what its default says of numbers."""
    rules = [rule for rule, keys in RULES.items() if _is_among(key, keys)]
    numbers = [part for part in _parts(default) if type(part) in (int, float)]
    if rules or not numbers or min(numbers) < 0:
        return rules
    if min(numbers) == 0 or _is_among(key, MAY_BE_ZERO):
        return [_number("at least 0", lambda value: value >= 0)]
    if all(isinstance(number, int) for number in numbers):
        return [_number("at least 1", lambda value: value >= 1)]
    return [_number("above 0", lambda value: value > 0)]


def _check_rule(name: str, value: Any, rule: Rule) -> None:
    for part in _parts(value):
        if part is None or rule.holds(part):
            continue
        subject = name if part is value else f"every value of {name}"
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

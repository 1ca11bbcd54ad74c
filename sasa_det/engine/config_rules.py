"""What config keys allow, as tables."""

from collections.abc import Callable
from typing import Any, NamedTuple

import detectron2.solver.build
from detectron2.layers import get_norm

from .schedule import WARMUP_THEN_COSINE

__all__ = [
    "EXAMPLES",
    "INCREASING",
    "MAY_BE_FLAT",
    "MAY_BE_INFINITE",
    "MAY_BE_NONE",
    "NOT_EMPTY",
    "RULES",
    "Rule",
]


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


def _at_least(low: int) -> Rule:
    return _number(f"at least {low}", lambda value: value >= low)


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
# and some are those of one version of detectron2. What is missing is checked where the model is
# built from it, as MODEL.SASA is.
RULES: dict[Rule, str] = {
    _at_least(0): """
        DATALOADER.NUM_WORKERS DATALOADER.SKIP_UNREADABLE
        INPUT.MIN_SIZE_TEST INPUT.MIN_SIZE_TRAIN
        MODEL.*.SMOOTH_L1_*BETA MODEL.*LOSS_WEIGHT MODEL.BACKBONE.FREEZE_AT
        MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT MODEL.PROPOSAL_GENERATOR.MIN_SIZE
        MODEL.RETINANET.FOCAL_LOSS_GAMMA MODEL.RETINANET.NUM_CONVS
        MODEL.ROI_*_HEAD.NUM_CONV MODEL.ROI_*_HEAD.NUM_FC MODEL.ROI_*_HEAD.POOLER_SAMPLING_RATIO
        MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER
        MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        SOLVER.*_EPOCHS SOLVER.BASE_LR_END SOLVER.BIAS_LR_FACTOR SOLVER.MAX_CHECKPOINTS
        SOLVER.NUM_DECAYS SOLVER.REFERENCE_BATCH SOLVER.REFERENCE_WORLD_SIZE SOLVER.WARMUP_ITERS
        SOLVER.WEIGHT_DECAY*
        TEST.EARLY_STOPPING TEST.EVAL_* VIS_PERIOD
    """,
    _at_least(1): """
        DATASETS.PRECOMPUTED_PROPOSAL_TOPK_*
        INPUT.CLASSIFICATION.CROP_SIZE INPUT.CLASSIFICATION.RESIZE_TEST
        INPUT.JITTER.CROP_SIZE INPUT.MAX_PIXELS INPUT.MAX_SIZE_*
        MODEL.*.BATCH_SIZE_PER_IMAGE MODEL.*.CONVS_DIM MODEL.*.NUM_CLASSES MODEL.*TOPK_*
        MODEL.FPN.OUT_CHANNELS
        MODEL.RESNETS.*_OUT_CHANNELS MODEL.RESNETS.DEFORM_NUM_GROUPS MODEL.RESNETS.NUM_GROUPS
        MODEL.RESNETS.RES5_DILATION MODEL.RESNETS.WIDTH_PER_GROUP
        MODEL.ROI_*_HEAD.CONV_DIM* MODEL.ROI_*_HEAD.FC_DIM MODEL.ROI_*_HEAD.POOLER_RESOLUTION
        MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        MODEL.SEM_SEG_HEAD.COMMON_STRIDE
        SOLVER.ACCUMULATION_STEPS SOLVER.CHECKPOINT_PERIOD SOLVER.IMS_PER_BATCH SOLVER.MAX_ITER
        SOLVER.STEPS
        TEST.AUG.*_SIZE* TEST.DETECTIONS_PER_IMAGE TEST.IMS_PER_BATCH TEST.PRECISE_BN.NUM_ITER
    """,
    _number("above 0", lambda value: value > 0): """
        INPUT.CROP.SIZE INPUT.JITTER.*_SCALE
        MODEL.*.BBOX_REG_WEIGHTS MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS MODEL.ANCHOR_GENERATOR.SIZES
        MODEL.PIXEL_STD
        SOLVER.BASE_LR SOLVER.CLIP_GRADIENTS.CLIP_VALUE SOLVER.CLIP_GRADIENTS.NORM_TYPE
        SOLVER.GAMMA SOLVER.LOGIT_LR_FACTOR
        TEST.KEYPOINT_OKS_SIGMAS
    """,
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
    _number("above 0 and below 1, or 0 for none", lambda value: 0 <= value < 1): """
        DATASETS.HOLDOUT
    """,
    _number("at least 0 and below 1", lambda value: 0 <= value < 1): """
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
    _number("a number", lambda value: True): "MODEL.ANCHOR_GENERATOR.ANGLES MODEL.PIXEL_MEAN",
    # The seeds of the processes follow on it; NumPy takes 32 bits.
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
    _one_of("SGD", "AdamW"): "SOLVER.OPTIMIZER",
    _one_of("linear", "constant"): "SOLVER.WARMUP_METHOD",
    _one_of("max", "min"): "TEST.BEST_MODE",
}

# A value nests lists, and holds strings or numbers, as its default does. These are examples where
# the default does not show it; TEST.EXPECTED_RESULTS, with both, is checked with the metrics.
EXAMPLES = {
    ("",): """
        DATASETS.PROPOSAL_FILES_* DATASETS.TEST DATASETS.TRAIN MODEL.FPN.IN_FEATURES
        MODEL.ACTIVATION_CHECKPOINTING MODEL.WEIGHTS_ALLOW
    """,
    (0.0,): "SOLVER.STEP_EPOCHS TEST.KEYPOINT_OKS_SIGMAS",
    0.0: "SOLVER.WEIGHT_DECAY_BIAS",
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
MAY_BE_NONE = "SOLVER.WEIGHT_DECAY_BIAS"
MAY_BE_INFINITE = "SOLVER.CLIP_GRADIENTS.NORM_TYPE"

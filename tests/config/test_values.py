"""Values of a config: what is out of range is told with its key, its value and what is allowed."""

from fnmatch import fnmatchcase

import pytest
from detectron2.config import get_cfg

from sasa_det import add_sasa_config
from sasa_det.config import values
from sasa_det.config.keys import flatten
from sasa_det.config.options import RunOptions
from sasa_det.config.values import (
    INCREASING,
    MAY_BE_INFINITE,
    MAY_BE_NONE,
    MAY_BE_ZERO,
    NOT_EMPTY,
    RULES,
)
from sasa_det.engine import UsageError, load_config

# Keys that detectron2's release 0.6 lacks.
LATER = {
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES",
    "SOLVER.BASE_LR_END",
    "SOLVER.NUM_DECAYS",
}


def check_values(cfg):
    values.check_values(flatten(cfg))


def check_schedule(cfg):
    values.check_schedule(RunOptions.read(cfg))


WRONG = [
    # One key of each rule.
    ("SOLVER.WARMUP_FACTOR", 1.5, "within [0, 1]"),
    ("MODEL.RETINANET.SCORE_THRESH_TEST", -0.1, "within [0, 1]"),
    ("INPUT.CLASSIFICATION.MIN_AREA", 0.0, "above 0 and at most 1"),
    ("MODEL.RETINANET.PRIOR_PROB", 0.0, "above 0 and below 1"),
    ("MODEL.EMA.DECAY", 1.0, "at least 0 and below 1"),
    ("DATASETS.HOLDOUT", 1.0, "at least 0 and below 1"),
    ("MODEL.RETINANET.FOCAL_LOSS_ALPHA", 1.5, "within [0, 1], or -1"),
    ("MODEL.RPN.CONV_DIMS", [0], "at least 1, or -1"),
    ("MODEL.RETINANET.IOU_LABELS", [0, 2, 1], "-1, 0 or 1"),
    ("MODEL.SASA.KERNEL_SIZE", 4, "odd and at least 1"),
    ("MODEL.SASA.BACKEND", "metal", "empty or a backend of sasa_det.ops"),
    ("MODEL.SASA.QK_NORM", "LN", "empty or one of BN, RMS, cosine"),
    ("MODEL.SASA.SCALE_LOGITS", 1, "True or False"),
    ("SEED", -2, "within [-1, 2147483647]"),
    ("SEED", 2**31, "within [-1, 2147483647]"),
    ("VERSION", 1, "2"),
    ("OUTPUT_DIR", "", "a folder on the disk"),
    ("OUTPUT_DIR", "s3://bucket/run", "a folder on the disk"),
    ("DATALOADER.SAMPLER_TRAIN", "TrainSampler", "one of TrainingSampler, RepeatFactor"),
    ("INPUT.FORMAT", "GBR", "one of BGR, RGB, "),
    ("INPUT.RANDOM_FLIP", "both", "one of horizontal, vertical, none"),
    ("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "l1", "one of smooth_l1, giou"),
    ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "RoIAlign", "one of ROIAlign"),
    ("SOLVER.AMP.DTYPE", "float8", "one of float16, bfloat16"),
    ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norms", "one of value, norm, full_model"),
    ("SOLVER.LR_SCHEDULER_NAME", "CosineLR", "one of WarmupMultiStepLR, WarmupCosineLR"),
    ("SOLVER.WARMUP_METHOD", "log", "one of linear, constant"),
    ("TEST.BEST_MODE", "most", "one of max, min"),
    # What follows the default: a number above 0, an integer above 0, 0, None.
    ("SOLVER.BASE_LR", 0.0, "above 0"),
    ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, -1.0]], "above 0"),
    ("TEST.KEYPOINT_OKS_SIGMAS", [0.0], "above 0"),
    ("SOLVER.MAX_ITER", 0, "at least 1"),
    ("SOLVER.STEPS", (0, 100), "at least 1"),
    ("SOLVER.CHECKPOINT_PERIOD", 0, "at least 1"),
    ("TEST.EVAL_PERIOD", -1, "at least 0"),
    ("INPUT.MIN_SIZE_TRAIN", (640, -1), "at least 0"),
    ("SOLVER.WEIGHT_DECAY_BIAS", -1.0, "at least 0"),
    ("SOLVER.WEIGHT_DECAY_LOGIT", -1.0, "at least 0"),
    ("SOLVER.LOGIT_WARMUP_ITERS", -1, "at least 0"),
    ("SOLVER.LOGIT_WARMUP_ITERS", 2.5, "an integer"),
    # Lists of some length or order, and what does not go together.
    ("INPUT.CROP.SIZE", [0.5], "hold 2 values"),
    ("INPUT.MIN_SIZE_TRAIN", (), "at least one value"),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [], "at least one value"),
    ("MODEL.PIXEL_MEAN", [1.0, 2.0], "hold 3 values"),
    ("MODEL.RETINANET.IOU_LABELS", [0, 1], "hold 3 values"),
    ("MODEL.RETINANET.IOU_THRESHOLDS", [0.5, 0.4], "increase"),
    ("SOLVER.STEPS", (200, 100), "increase"),
    ("SOLVER.STEP_EPOCHS", (2.0, 2.0), "increase"),
    ("TEST.EARLY_STOPPING", 3, "0 without TEST.BEST_METRIC"),
    # Lists that hold what is no part of theirs.
    ("SOLVER.STEPS", ((1, 2), 3), "a list of numbers"),
    ("SOLVER.STEPS", ("1", "2"), "a list of numbers"),
    ("SOLVER.STEP_EPOCHS", ([],), "a list of numbers"),
    ("SOLVER.WEIGHT_DECAY_BIAS", (0.1,), "a number"),
    ("INPUT.CROP.SIZE", [[0.1], [0.2]], "a list of numbers"),
    ("INPUT.MIN_SIZE_TRAIN", ([640, 800],), "a list of numbers"),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [["large"]], "a list of lists of numbers"),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [[32], 64], "a list of lists of numbers"),
    ("MODEL.PIXEL_MEAN", [1.0, 2.0, True], "a list of numbers"),
    ("MODEL.ANCHOR_GENERATOR.ANGLES", [[[0]]], "a list of lists of numbers"),
    ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [0, 0, 0, 0], "a list of True or False"),
    ("MODEL.RETINANET.IN_FEATURES", ["p3", ["p4"]], "a list of strings"),
    ("MODEL.ROI_HEADS.IOU_LABELS", [[], []], "a list of numbers"),
    ("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", (1.0, 1.0), "a list of lists of numbers"),
    ("MODEL.WEIGHTS_ALLOW", [1], "a list of strings"),
    ("DATASETS.TRAIN", (("digits_train",),), "a list of strings"),
    ("TEST.KEYPOINT_OKS_SIGMAS", [[0.1]], "a list of numbers"),
    ("MODEL.RETINANET.BBOX_REG_WEIGHTS", (1.0, 1.0), "hold 4 values"),
    ("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", ((1.0,),) * 3, "hold 4 values"),
    # What no key may be.
    ("OUTPUT_DIR", "a\0b", "must not hold a null character"),
    ("SEED", {"A": 1}, "a value, got a section"),
    ("SOLVER.BASE_LR", float("inf"), "finite"),
    ("SOLVER.BASE_LR", float("nan"), "finite"),
    ("MODEL.PIXEL_MEAN", [1.0, float("nan"), 1.0], "finite"),
    ("MODEL.RESNETS.STEM_OUT_CHANNELS", 2**64, "an integer of 64 bits"),
    ("SOLVER.MAX_ITER", None, "have a value"),
    ("MODEL.PIXEL_STD", [1.0, None, 1.0], "have a value"),
    ("MODEL.PIXEL_STD", [1.0, b"1", 1.0], "hold numbers, strings, True and False"),
]  # fmt: skip


def defaults():
    cfg = get_cfg()
    add_sasa_config(cfg)
    return cfg


def changed(key, value):
    cfg = defaults()
    section, _, name = key.rpartition(".")
    node = cfg
    for part in section.split(".") if section else ():
        node = node[part]
    node[name] = value
    return cfg


@pytest.mark.parametrize(("key", "value", "allowed"), WRONG)
def test_values_out_of_range(key, value, allowed):
    with pytest.raises(UsageError) as error:
        check_values(changed(key, value))
    message = str(error.value)
    assert key in message and allowed in message and "must" in message
    assert "\n" not in message
    if value is not None and value != 2**64:
        assert "got " in message


ODD = [
    [], [[]], [[], 1], [None], ((1, 2), 3), [[1, 2], [3]], ["a", 1], [["a"], ["b"]], [True, 2.5],
    [[[1]]], [float("nan")], [2**70], [-1], [0],
]  # fmt: skip


def test_odd_lists_are_fine_or_refused_and_never_an_error():
    lists = [k for k, v in flatten(defaults()).items() if isinstance(v, list | tuple)]
    assert len(lists) > 35
    refused = 0
    for key in lists:
        for value in ODD:
            try:
                check_values(changed(key, value))
            except UsageError as error:
                assert key in str(error)
                refused += 1
    assert refused > len(lists) * len(ODD) / 2


def test_names_are_suggested():
    with pytest.raises(UsageError, match=r"got 'bitmaps'; did you mean bitmask\?$"):
        check_values(changed("INPUT.MASK_FORMAT", "bitmaps"))
    with pytest.raises(UsageError, match=r"got 'SyncBM'; did you mean SyncBN\?$"):
        check_values(changed("MODEL.RETINANET.NORM", "SyncBM"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", float("inf")),
        ("SOLVER.WEIGHT_DECAY_BIAS", None),
        ("SOLVER.WEIGHT_DECAY_BIAS", 0.0),
        ("SOLVER.WEIGHT_DECAY_LOGIT", 2),
        ("MODEL.SASA.QK_NORM", "cosine"),
        ("MODEL.RETINANET.FOCAL_LOSS_ALPHA", -1.0),
        ("MODEL.RESNETS.NORM", "GN"),
        ("INPUT.MIN_SIZE_TEST", 0),
        ("SOLVER.STEPS", ()),
        ("SEED", -1),
        ("SEED", 2**31 - 1),
        # detectron2 takes one list of anchors for all levels.
        ("MODEL.ANCHOR_GENERATOR.SIZES", [32, 64.5]),
    ],
)
def test_values_at_the_edge_are_fine(key, value):
    check_values(changed(key, value))


def test_nesterov_needs_a_momentum():
    cfg = changed("SOLVER.NESTEROV", True)
    check_values(cfg)
    cfg.SOLVER.MOMENTUM = 0.0
    with pytest.raises(
        UsageError, match="SOLVER.MOMENTUM must be above 0 with SOLVER.NESTEROV True, got 0"
    ):
        check_values(cfg)
    cfg.SOLVER.OPTIMIZER = "AdamW"  # which has neither
    check_values(cfg)


def test_images_of_one_channel():
    cfg = changed("INPUT.FORMAT", "L")
    with pytest.raises(UsageError, match="MODEL.PIXEL_MEAN must hold 1 values"):
        check_values(cfg)
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [128.0], [1.0]
    check_values(cfg)


def test_a_range_of_sizes_has_two_ends():
    cfg = changed("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range")
    with pytest.raises(UsageError, match="INPUT.MIN_SIZE_TRAIN must hold 2 values"):
        check_values(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN = (640, 800)
    check_values(cfg)


def test_crops_relative_to_an_image_are_not_larger_than_it():
    cfg = changed("INPUT.CROP.SIZE", [0.5, 1.5])
    check_values(cfg)
    cfg.INPUT.CROP.ENABLED = True
    with pytest.raises(UsageError, match="every value of INPUT.CROP.SIZE must be at most 1 with"):
        check_values(cfg)
    cfg.INPUT.CROP.TYPE = "absolute"
    check_values(cfg)


def test_every_pattern_of_the_tables_fits_a_key():
    """A key that is renamed must not lose its rule."""
    known = defaults()
    lists = (INCREASING, MAY_BE_INFINITE, MAY_BE_NONE, MAY_BE_ZERO, NOT_EMPTY, *RULES.values())
    for pattern in {pattern for keys in lists for pattern in keys.split()} - LATER:
        assert any(fnmatchcase(key, pattern) for key in flatten(known)), pattern


# Which are negative by default or compared with what images hold.
MAY_BE_NEGATIVE = {
    "GLOBAL.HACK", "MODEL.ANCHOR_GENERATOR.ANGLES", "MODEL.PIXEL_MEAN", "MODEL.RPN.BOUNDARY_THRESH",
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE",
}  # fmt: skip


def with_number(value, number):
    if isinstance(value, list | tuple):
        return type(value)(with_number(part, number) for part in value)
    return number


def test_numbers_below_zero_are_refused():
    allowed, tried = set(), 0
    for key, value in flatten(defaults()).items():
        part = value
        while isinstance(part, list | tuple) and part:
            part = part[0]
        if isinstance(part, int | float) and not isinstance(part, bool):
            tried += 1
            try:
                check_values(changed(key, with_number(value, type(part)(-2))))
            except UsageError as error:
                assert key in str(error)
            else:
                allowed.add(key)
    assert tried > 120 and allowed == MAY_BE_NEGATIVE


SCHEDULES = [
    ({"WARMUP_ITERS": 10, "MAX_ITER": 10}, "SOLVER.WARMUP_ITERS must be below SOLVER.MAX_ITER"),
    ({"STEPS": (5, 10)}, "SOLVER.STEPS must be below SOLVER.MAX_ITER, which is 10, got (5, 10)"),
    ({"STEPS": (5, 30)}, "SOLVER.STEPS must be below SOLVER.MAX_ITER"),
    (
        {"MAX_EPOCHS": 2.0, "WARMUP_EPOCHS": 2.5},
        "SOLVER.WARMUP_EPOCHS must be below SOLVER.MAX_EPOCHS, which is 2.0, got 2.5",
    ),
    (
        {"MAX_EPOCHS": 2.0, "STEP_EPOCHS": (1.0, 3.0)},
        "SOLVER.STEP_EPOCHS must be below SOLVER.MAX_EPOCHS",
    ),
]


def schedule(**lengths):
    cfg = defaults()
    cfg.SOLVER.update({"MAX_ITER": 10, "WARMUP_ITERS": 1, "STEPS": (), **lengths})
    return cfg


@pytest.mark.parametrize(("lengths", "message"), SCHEDULES)
def test_schedules_that_do_not_fit(lengths, message):
    with pytest.raises(UsageError) as error:
        check_schedule(schedule(**lengths))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "lengths",
    [
        {"STEPS": (5, 9)},
        {"WARMUP_ITERS": 9},
        # Cosine has no steps.
        {"STEPS": (30000,), "LR_SCHEDULER_NAME": "WarmupCosineLR"},
        # What is in epochs stands in for what is in iterations.
        {"WARMUP_ITERS": 100, "WARMUP_EPOCHS": 0.1},
        {"MAX_EPOCHS": 2.0, "WARMUP_ITERS": 100, "STEPS": (30000,)},
    ],
)
def test_schedules_that_fit(lengths):
    check_schedule(schedule(**lengths))


def test_the_end_of_the_learning_rate_is_not_above_its_beginning():
    cfg = schedule(LR_SCHEDULER_NAME="WarmupCosineLR")
    if "BASE_LR_END" not in cfg.SOLVER:
        pytest.skip("this detectron2 has no SOLVER.BASE_LR_END")
    cfg.SOLVER.BASE_LR_END = 2 * cfg.SOLVER.BASE_LR
    with pytest.raises(UsageError, match="SOLVER.BASE_LR_END must be at most SOLVER.BASE_LR"):
        check_schedule(cfg)


def test_values_are_checked_wherever_they_come_from(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("SOLVER: {CHECKPOINT_PERIOD: 0}")
    with pytest.raises(UsageError, match="SOLVER.CHECKPOINT_PERIOD must be at least 1, got 0"):
        load_config(str(path))
    path.write_text("SOLVER: {BASE_LR: .nan}")
    with pytest.raises(UsageError, match="SOLVER.BASE_LR must be finite, got nan"):
        load_config(str(path))
    with pytest.raises(UsageError, match="SOLVER.BASE_LR must be finite, got inf"):
        load_config(opts=["SOLVER.BASE_LR", "1e999"])


def test_averages_that_outlast_a_run_are_told(caplog):
    def told(steps):
        caplog.clear()
        opts = ["MODEL.BN_DECAY", "0.99", "MODEL.EMA.DECAY", "0.999", "SOLVER.MAX_ITER", str(steps)]
        cfg = load_config("configs/Quick/classifier_SASA.yaml", opts)
        values.warn_of_slow_averages(RunOptions.read(cfg))
        return caplog.messages

    # What is left of the beginning after 1 / (1 - decay) steps is 37%.
    assert told(1001) == []
    assert [message.split()[:2] for message in told(999)] == [["MODEL.EMA.DECAY", "0.999"]]
    batch_norms, ema = told(50)
    assert "some 100 steps and the run has 50" in batch_norms and "0.8 or less" in batch_norms
    assert "some 1000 steps and the run has 50" in ema

"""A resumed run's config beside the one that its output folder holds."""

import logging

import pytest
import yaml

from sasa_det.config import changes
from sasa_det.config.options import RunOptions
from sasa_det.engine import UsageError, load_config

CONFIG = "configs/Quick/retinanet_SASA.yaml"


def check_changes(cfg):
    changes.check_changes(RunOptions.read(cfg))


def log_changes(cfg):
    changes.log_changes(RunOptions.read(cfg))


@pytest.fixture
def config(tmp_path):
    """Return a function that makes the config of a run in one folder from overrides."""
    return lambda *opts: load_config(CONFIG, [*map(str, opts), "OUTPUT_DIR", str(tmp_path)])


@pytest.fixture
def stored(config, tmp_path):
    (tmp_path / "config.yaml").write_text(config().dump())
    return tmp_path / "config.yaml"


def test_the_same_config_has_no_changes(config, stored, caplog):
    cfg = config()
    check_changes(cfg)
    with caplog.at_level(logging.INFO, "sasa_det"):
        log_changes(cfg)
    assert not caplog.records


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.SASA.KERNEL_SIZE", 5),
        ("MODEL.SASA.HEAD", "convolution"),
        ("MODEL.RESNETS.DEPTH", 38),
        ("MODEL.RETINANET.NUM_CLASSES", 3),
        ("MODEL.RETINANET.FOCAL_LOSS_GAMMA", 1.5),
        ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0]),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]]),
        ("INPUT.FORMAT", "BGR"),
        ("SOLVER.OPTIMIZER", "SGD"),
        ("SOLVER.WEIGHT_DECAY", 0.0),
        ("SOLVER.WEIGHT_DECAY_BIAS", 0.0),
        ("SOLVER.LOGIT_LR_FACTOR", 1.0),
        ("SEED", 7),
        ("DATASETS.TRAIN", ("digits_val",)),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
        ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False),
    ],
)
def test_what_makes_the_checkpoint_meaningless_is_refused(key, value, config, stored):
    with pytest.raises(UsageError) as error:
        check_changes(config(key, value))
    message = str(error.value)
    assert f"{key} (from " in message and str(stored.parent) in message and "\n" not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.MAX_ITER", 9),
        ("SOLVER.BASE_LR", 0.001),
        ("SOLVER.IMS_PER_BATCH", 4),
        ("SOLVER.WARMUP_FACTOR", 0.5),
        ("SOLVER.CHECKPOINT_PERIOD", 3),
        ("TEST.EVAL_PERIOD", 3),
        ("TEST.DETECTIONS_PER_IMAGE", 50),
        ("DATASETS.TEST", ("digits_train",)),
        ("DATALOADER.NUM_WORKERS", 2),
        ("MODEL.DEVICE", "cuda"),
        ("MODEL.WEIGHTS", "elsewhere.pth"),
        ("MODEL.SASA.BACKEND", "reference"),
        ("MODEL.SAN.WIDTH_MULTIPLIER", 0.5),  # there is no SAN
        ("MODEL.COMPILE", True),
        ("MODEL.RETINANET.SCORE_THRESH_TEST", 0.1),
        ("MODEL.RETINANET.TOPK_CANDIDATES_TEST", 10),
        ("MODEL.RETINANET.NMS_THRESH_TEST", 0.6),
        ("MODEL.RPN.POST_NMS_TOPK_TEST", 10),
    ],
)
def test_what_may_change_is_logged(key, value, config, stored, caplog):
    cfg = config(key, value)
    check_changes(cfg)
    with caplog.at_level(logging.INFO, "sasa_det"):
        log_changes(cfg)
    (record,) = caplog.records
    assert (
        f"{key}, from " in record.getMessage() and str(value).strip("()',") in record.getMessage()
    )


def test_a_san_stays_what_it_is(config, stored):
    name = "build_san_backbone"
    with pytest.raises(UsageError, match=r"MODEL.SAN.DEPTH \(from 10 to 15\)"):
        check_changes(config("MODEL.BACKBONE.NAME", name, "MODEL.SAN.DEPTH", 15))


def test_all_refused_keys_are_listed(config, stored):
    cfg = config("SEED", 3, "SOLVER.MAX_ITER", 9, "MODEL.SASA.KERNEL_SIZE", 5)
    with pytest.raises(UsageError) as error:
        check_changes(cfg)
    message = str(error.value)
    assert "MODEL.SASA.KERNEL_SIZE (from 3 to 5), SEED (from -1 to 3); " in message
    assert "MAX_ITER" not in message


def test_keys_of_another_version(config, stored, caplog):
    """What the stored config lacks had its default; what this version lacks has no meaning."""
    values = yaml.safe_load(stored.read_text())
    del values["MODEL"]["SASA"]["HEAD_MIXING_LAYER"]
    values["MODEL"]["OF_THE_PAST"] = 3
    stored.write_text(yaml.safe_dump(values))
    check_changes(config())
    with caplog.at_level(logging.INFO, "sasa_det"):
        log_changes(config())
    assert "MODEL.OF_THE_PAST, from 3 to " in caplog.text
    with pytest.raises(UsageError, match="HEAD_MIXING_LAYER .from False to True."):
        check_changes(config("MODEL.SASA.HEAD_MIXING_LAYER", True))


@pytest.fixture
def data_config(tmp_path):
    """Return a function that makes a config which names its training data by their files."""

    def make(json_file, images="images"):
        cfg = load_config(opts=["OUTPUT_DIR", str(tmp_path)])
        cfg.defrost()
        cfg.DATASETS.TRAIN_JSON, cfg.DATASETS.TRAIN = json_file, (json_file,)
        cfg.DATASETS.TRAIN_IMAGES = images
        return cfg

    return make


def test_two_ways_to_write_a_path(data_config, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(data_config("train.json").dump())
    same = data_config(str(tmp_path / "train.json"), f"{tmp_path}/images/")
    check_changes(same)
    with caplog.at_level(logging.INFO, "sasa_det"):
        log_changes(same)
    assert not caplog.records


def test_files_may_move_but_named_data_may_not_change(data_config, tmp_path, caplog):
    """Whether the records are the same the checkpoint knows, which has a digest of them."""
    (tmp_path / "config.yaml").write_text(data_config("/old/train.json", "/old/images").dump())
    moved = data_config("/new/train.json", "/new/images")
    check_changes(moved)
    with caplog.at_level(logging.INFO, "sasa_det"):
        log_changes(moved)
    assert "DATASETS.TRAIN_JSON, from '/old/train.json' to '/new/train.json'" in caplog.text
    named = data_config("", "")
    named.DATASETS.TRAIN = ("digits_train",)
    with pytest.raises(UsageError, match=r"change of DATASETS.TRAIN \(from "):
        check_changes(named)


def test_a_folder_without_a_config(config, caplog):
    cfg = config()
    check_changes(cfg)
    log_changes(cfg)
    assert "config.yaml to compare the config with" in caplog.text


def test_a_stored_config_executes_nothing(config, stored, tmp_path):
    marker = tmp_path / "executed"
    stored.write_text(f"SEED: !!python/object/apply:os.system ['touch {marker}']")
    with pytest.raises(UsageError, match=f"{stored}, line 1: .* is not allowed"):
        check_changes(config())
    assert not marker.exists()

"""The checks of a run before its first step, each of which ends in one sentence."""

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluators
from detectron2.modeling import build_model

from sasa_det.checkpoint import CheckpointError
from sasa_det.config.options import RunOptions
from sasa_det.engine import Trainer, UsageError, checks, load_config
from sasa_det.errors import USAGE_ERRORS, print_error

CONFIG = "configs/Quick/retinanet_SASA.yaml"
MASK_RCNN = "configs/COCO-InstanceSegmentation/mask_rcnn_SASA_R_50_FPN.yaml"


def check_run(cfg, **kwargs):
    checks.check_run(RunOptions.read(cfg), Trainer, **kwargs)


def check_model(cfg, **kwargs):
    checks.check_model(RunOptions.read(cfg), Trainer, **kwargs)


def check_processes(cfg, *args):
    checks.check_processes(RunOptions.read(cfg), *args)


@pytest.fixture
def config(digits, tmp_path):
    """Return a function that makes the config of a run on the digits from overrides."""

    def make(*opts, config_file=CONFIG):
        sets = {f"{name}.json": digits / name for name in ("train", "val")}
        train, test = ((str(digits / file), str(images)) for file, images in sets.items())
        opts = [*map(str, opts), "OUTPUT_DIR", str(tmp_path / "run")]
        return load_config(str(config_file), opts, train, test)

    return make


def told(*calls):
    """Call a function that must find a mistake and return the sentence that tells it."""
    with pytest.raises(USAGE_ERRORS) as error:
        for call in calls:
            call()
    message = str(error.value)
    assert "\n" not in message
    return message


MODELS = {
    "heads": (["MODEL.SASA.NUM_HEADS", "5"], "must be a multiple of num_heads 5"),
    "stage": (["MODEL.SASA.ATTENTION_STAGES", "['res7']"], "got 'res7'"),
    "feature": (
        ["MODEL.FPN.IN_FEATURES", "['res9']"],
        "a feature of MODEL.FPN.IN_FEATURES must be one of ['res3', 'res4', 'res5'], got 'res9'",
    ),
    "anchors": (
        ["MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16]]"],
        "the config does not fit together: AssertionError: ",
    ),
    "layers": (["MODEL.RETINANET.NUM_CONVS", str(2**62)], "does not fit together: MemoryError"),
    "classes": (["MODEL.RETINANET.NUM_CLASSES", "3"], "MODEL.RETINANET.NUM_CLASSES is 3 but"),
    "jitter": (["INPUT.JITTER.MIN_SCALE", "2.0"], "INPUT.JITTER.MIN_SCALE and MAX_SCALE must"),
    "checkpointed stage": (["MODEL.ACTIVATION_CHECKPOINTING", "['res9']"], "got res9"),
    "weights": (["MODEL.WEIGHTS", "nowhere.pth"], "MODEL.WEIGHTS nowhere.pth does not exist."),
    "remote weights": (["MODEL.WEIGHTS", "https://example.invalid/a.pth"], "sha256"),
    "device": (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE must be cpu, cuda or cuda:N, got 'gpu'."),
    "warmup": (
        ["SOLVER.WARMUP_ITERS", "4"],
        "SOLVER.WARMUP_ITERS must be below SOLVER.MAX_ITER, which is 4, got 4.",
    ),
    "parts": (
        ["SOLVER.ACCUMULATION_STEPS", "3"],
        "SOLVER.IMS_PER_BATCH must be a multiple of the number of processes times "
        "SOLVER.ACCUMULATION_STEPS, which is 3, got 2.",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_what_does_not_fit_is_told_before_any_work(case, config, tmp_path):
    opts, message = MODELS[case]
    assert message in told(lambda: check_run(config(*opts)))
    assert not (tmp_path / "run").exists()


RETINANET_NAMES = [
    ("MODEL.META_ARCHITECTURE", "AttentionRetinaNets", "AttentionRetinaNet"),
    ("MODEL.BACKBONE.NAME", "build_sasa_resnet", "build_sasa_resnet_backbone"),
    ("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchors", "DefaultAnchorGenerator"),
]
MASK_RCNN_NAMES = [
    ("MODEL.PROPOSAL_GENERATOR.NAME", "RPNN", "RPN"),
    ("MODEL.RPN.HEAD_NAME", "StandardRPN", "StandardRPNHead"),
    ("MODEL.ROI_HEADS.NAME", "StandardROIHead", "StandardROIHeads"),
    ("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvHead", "FastRCNNConvFCHead"),
    ("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNHead", "MaskRCNNConvUpsampleHead"),
]


@pytest.mark.parametrize(("key", "name", "meant"), RETINANET_NAMES + MASK_RCNN_NAMES)
def test_names_that_are_not_registered(key, name, meant, config):
    options = [key, name]
    config_file = CONFIG
    if (key, name, meant) in MASK_RCNN_NAMES:
        # Boxes alone, as the digits have no masks, but with the mask head, and as small as it goes.
        config_file = MASK_RCNN
        options += ["MODEL.RESNETS.DEPTH", "26", "MODEL.SASA.WIDTH_MULTIPLIER", "0.25"]
        options += ["MODEL.DEVICE", "cpu", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"]
        options += ["MODEL.MASK_ON", str(key == "MODEL.ROI_MASK_HEAD.NAME")]
    cfg = config(*options, config_file=config_file)
    with pytest.raises(UsageError) as error:
        check_model(cfg, eval_only=False)
    assert str(error.value) == f"{key} {name} is not registered; did you mean {meant}?"


def test_names_that_are_not_used_do_not_matter(config):
    check_model(config("MODEL.ROI_HEADS.NAME", "NoSuchHeads"), eval_only=False)


def test_names_of_data_sets():
    cfg = load_config(CONFIG, ["DATASETS.TRAIN", "('digits_trian',)"])
    message = told(lambda: check_run(cfg))
    assert "digits_trian" in message and "digits_train" in message


def test_evaluation_needs_weights_and_no_training_data(config, tmp_path):
    assert "--eval-only needs weights" in told(lambda: check_run(config(), eval_only=True))
    weights = tmp_path / "weights.pth"
    opts = ["MODEL.WEIGHTS", weights, "DATASETS.TRAIN", "()", "SOLVER.WARMUP_ITERS", "9"]
    cfg = config(*opts)
    state = build_model(cfg).state_dict()
    torch.save(state, weights)
    check_run(cfg, eval_only=True)
    # What does not fill the model is told before the output folder is touched.
    state.pop("head.cls_score.1.bias")
    torch.save(state, weights)
    with pytest.raises(CheckpointError, match="head.cls_score.1.bias"):
        check_run(cfg, eval_only=True)
    # A run that is resumed takes its own weights, so that those it began with may be gone.
    check_run(config("MODEL.WEIGHTS", "gone.pth"), resumed=True)


def test_a_gpu_that_is_not_there(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = told(lambda: check_run(config("MODEL.DEVICE", "cuda")))
    assert "MODEL.DEVICE is cuda but no GPU is visible" in message
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = told(lambda: check_run(config("MODEL.DEVICE", "cuda:2")))
    assert "MODEL.DEVICE is cuda:2 but 2 GPUs are visible" in message


def test_processes_that_cannot_start_or_meet(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cpu, gpu, second = (config("MODEL.DEVICE", name) for name in ("cpu", "cuda", "cuda:1"))
    check_processes(cpu, 8)
    check_processes(gpu, 2)
    check_processes(second, 1)
    check_processes(gpu, 1, 2, "tcp://10.0.0.1:29500")
    check_processes(gpu, 1, 2, "file:///shared/meeting")
    message = told(lambda: check_processes(gpu, 3))
    assert message == "--num-gpus must be at most the 2 GPUs of this machine, got 3."
    message = told(lambda: check_processes(second, 2))
    assert message.startswith("MODEL.DEVICE must be cpu or cuda for a run of several processes")
    message = told(lambda: check_processes(cpu, 1, 2))
    assert message.startswith("--dist-url must be an address that all machines reach")
    for url in ("10.0.0.1:29500", "tcp://10.0.0.1", "http://host:80", "tcp://host:port", ""):
        message = told(lambda url=url: check_processes(cpu, 2, 1, url))
        assert message.endswith(f"auto, tcp://host:port or file:///path, got {url!r}.")


def test_metrics_that_evaluations_have(config):
    def asked(name, *opts):
        return lambda: check_run(config("TEST.BEST_METRIC", name, *opts))

    for name in ("bbox/AP", "bbox/AP75", "bbox/AP-7"):
        asked(name)()
    asked("ema/bbox/AP50", "MODEL.EMA.DECAY", 0.9)()
    asked("validation/total_loss", "TEST.VALIDATION_LOSS", True)()
    for name in ("bbox/APP", "ema/bbox/AP50", "validation/total_loss", "segm/AP", "bbox/AP-ten"):
        assert told(asked(name)).startswith("TEST.BEST_METRIC must be a metric of the evaluations")
    assert "got bbox/APP; did you mean bbox/AP?" in told(asked("bbox/APP"))
    expected = "[['bboxx', 'AP', 1.0, 1.0]]"
    message = told(lambda: check_run(config("TEST.EXPECTED_RESULTS", expected)))
    assert message.startswith("TEST.EXPECTED_RESULTS must hold [task, metric, value, tolerance]")
    check_run(config("TEST.EXPECTED_RESULTS", expected.replace("bboxx", "bbox")))
    for wrong in ("[1]", "[['bbox', ['AP'], 1.0, 1.0]]", "[['bbox', 'AP', 'x', 1.0]]"):
        message = told(lambda opts=wrong: check_run(config("TEST.EXPECTED_RESULTS", opts)))
        assert message.startswith("TEST.EXPECTED_RESULTS must hold [task, metric,")


def test_metrics_follow_classes_and_data_sets(config):
    cfg = config().clone()
    cfg.defrost()

    def refused(tests, best, *expected):
        cfg.DATASETS.TEST, cfg.TEST.BEST_METRIC = tests, best
        cfg.TEST.EXPECTED_RESULTS = list(expected)
        try:
            checks.check_metrics(RunOptions.read(cfg))
        except UsageError as error:
            return str(error).split()[0]
        return ""

    classes = {"no": [], "one": ["cat"], "two": ["cat", "a/b"]}
    for name, names in classes.items():
        MetadataCatalog.get(name).set(thing_classes=names)
    best, expected = "TEST.BEST_METRIC", ["bbox", "AP", 1.0, 0.1]
    assert not refused(("one",), "bbox/AP") and refused(("one",), "bbox/AP-cat") == best
    assert not refused(("two",), "bbox/AP-a/b") and refused(("two",), "two/bbox/AP") == best
    assert not refused(("one", "two"), "two/bbox/AP-cat")
    assert refused(("one", "two"), "one/bbox/AP-cat") == best
    assert refused(("one", "two"), "bbox/AP") == best
    # One data set, though it is named twice, as in the results.
    assert not refused(("two", "two"), "bbox/AP-cat")
    assert refused(("two", "two"), "two/bbox/AP") == best
    assert not refused((), "") and refused((), "bbox/AP") == best
    # detectron2 looks for them in the results of one data set.
    assert not refused(("one",), "", expected)
    assert refused(("one", "two"), "", expected) == "TEST.EXPECTED_RESULTS"
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = True
    assert not refused(("one",), "segm/APs") and not refused(("one",), "keypoints/APm")
    assert refused(("one",), "keypoints/APs") == best


@pytest.mark.parametrize("device", ["meta", "mps", "xpu", "gpu"])
def test_devices_that_are_none(device, config):
    message = told(lambda: check_run(config("MODEL.DEVICE", device)))
    assert message == f"MODEL.DEVICE must be cpu, cuda or cuda:N, got {device!r}."


def test_anchors_and_proposals_that_are_missing(config):
    message = told(lambda: config("MODEL.ANCHOR_GENERATOR.SIZES", "[[]]"))
    assert message == "MODEL.ANCHOR_GENERATOR.SIZES must hold at least one value, got [[]]."
    message = told(lambda: check_run(config("MODEL.LOAD_PROPOSALS", True)))
    assert message.startswith("DATASETS.PROPOSAL_FILES_TRAIN must hold one file for each data set")


def test_norms_that_need_gpus(config):
    cfg = config("MODEL.FPN.NORM", "SyncBN")
    check_run(cfg)
    message = told(lambda: check_run(cfg, num_processes=2))
    assert message.startswith("MODEL.FPN.NORM must not be SyncBN where several processes")


def test_errors_of_the_program_show_where_they_come_from(config, monkeypatch, capsys):
    """An error that is none of the config is not hidden behind a sentence."""
    cfg = config("MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16]]")
    with pytest.raises(UsageError) as error:
        check_model(cfg, eval_only=True)
    assert print_error(error.value) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and "Traceback" not in text and "SASA_DET_TRACEBACK" in text
    monkeypatch.setenv("SASA_DET_TRACEBACK", "1")
    assert print_error(error.value) == 2
    text = capsys.readouterr().err
    assert "Traceback" in text and "anchor_generator.py" in text
    assert text.splitlines()[-1].startswith("error: ")


# ------------------------------------------------------------------- what no batch can be run with


def test_one_image_of_one_pixel_after_the_strides_is_refused(config):
    opts = ["SOLVER.IMS_PER_BATCH", 2, "INPUT.JITTER.ENABLED", True, "INPUT.JITTER.CROP_SIZE", 64]
    opts += ["MODEL.RETINANET.NORM", "BN"]
    check_model(config(*opts), eval_only=False)
    message = told(lambda: check_model(config(*opts), eval_only=False, num_processes=2))
    assert message.startswith("head.cls_subnet.0.norms.3 is a batch norm that has one value")
    check_model(config(*opts), eval_only=True, num_processes=2)
    check_model(config(*opts[:5], 256, *opts[6:]), eval_only=False, num_processes=2)


def test_a_width_that_rcnn_heads_do_not_take_is_refused(config):
    opts = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.RPN.IN_FEATURES", "['res4']"]
    opts += ["MODEL.BACKBONE.NAME", "build_sasa_resnet_backbone", "MODEL.RESNETS.DEPTH", "26"]
    opts += ["MODEL.RESNETS.OUT_FEATURES", "['res4']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]"]
    opts += ["MODEL.SASA.WIDTH_MULTIPLIER", 0.5]
    message = told(lambda: check_model(config(*opts), eval_only=False))
    assert "Res5ROIHeads takes" in message and "set MODEL.SASA.WIDTH_MULTIPLIER 1.0" in message


@pytest.mark.parametrize(
    "key, most", [("SOLVER.IMS_PER_BATCH", 10**6), ("DATALOADER.NUM_WORKERS", 1000)]
)
def test_numbers_that_no_machine_can_serve(config, key, most):
    message = told(lambda: check_run(config(key, str(most + 1))))
    assert message == f"{key} must be at most {most}, got {most + 1}."


def test_the_builders_of_the_runs_own_trainer_are_tried(config):
    """What the check accepts, the run accepts: also a trainer that replaces a builder."""

    class WithSmallSteps(Trainer):
        @classmethod
        def build_optimizer(cls, cfg, model):
            return torch.optim.SGD(model.parameters(), lr=-1e-3)

    options = RunOptions.read(config())
    checks.check_run(options, Trainer)
    message = told(lambda: checks.check_run(options, WithSmallSteps))
    assert message == "Invalid learning rate: -0.001"


def test_metrics_of_the_runs_own_evaluator_are_not_known(config):
    class Counting(Trainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):
            return DatasetEvaluators([])

    options = RunOptions.read(config("TEST.BEST_METRIC", "counted/images"))
    checks.check_run(options, Counting)
    assert "TEST.BEST_METRIC must be a metric" in told(lambda: checks.check_run(options, Trainer))

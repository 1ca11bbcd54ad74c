"""Runs of a small LazyConfig: train, resume, evaluate, its yaml twin, and mistakes."""

import builtins
import copy
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import SimpleTrainer, create_ddp_model, hooks
from detectron2.evaluation import inference_on_dataset
from fvcore.common.checkpoint import PeriodicCheckpointer
from omegaconf import OmegaConf

from sasa_det.checkpoint import read_checkpoint
from sasa_det.config.lazy import load_lazy_config
from sasa_det.config.options import LAZY_KEYS, YAML_KEYS, RunOptions
from sasa_det.data import register_coco
from sasa_det.engine import Predictor, Trainer, UsageError, defaults, load_config
from sasa_det.engine.defaults import LAZY, argument_parser, run
from sasa_det.engine.export import export_parser, run_export
from sasa_det.engine.train import eval_parser, run_eval

DATA = {"train": "train", "test": "val"}
YAML = "configs/Quick/retinanet_SASA.yaml"
# The same in Python.
CONFIG = """
from pathlib import Path

from detectron2.config import LazyConfig
from omegaconf import OmegaConf

_PARENT = Path("configs/COCO-Detection/retinanet_SASA_R_50_full.py").resolve()
_SECTIONS = ("dataloader", "lr_multiplier", "model", "train")
dataloader, lr_multiplier, model, train = LazyConfig.load(str(_PARENT), _SECTIONS)
optimizer = LazyConfig.load(str(_PARENT.parents[1] / "Common" / "optim.py"), "AdamW")

_bottom_up = model.backbone.bottom_up
_bottom_up.depth, _bottom_up.norm, _bottom_up.width_multiplier = 26, "BN", 0.25
_bottom_up.attention.kernel_size, _bottom_up.stem_options.num_heads = 3, 2
model.backbone.out_channels, model.backbone.norm = 64, "BN"
model.head.norm, model.head.conv_dims = "BN", [64]
model.anchor_generator.sizes = [
    [16.0, 20.16, 25.4], [32.0, 40.32, 50.8], [64.0, 80.63, 101.59], [128.0, 161.3, 203.2],
    [256.0, 322.5, 406.4],
]

_train, _test = dataloader.train, dataloader.test
_scale, _crop, _flip = _train.mapper.augmentations
_scale.target_height = _scale.target_width = 64
_crop.crop_size = [64, 64]
_train.mapper.augmentations = [_scale, _crop]
_train.total_batch_size, _train.num_workers = 2, 0
_test.mapper.augmentations[0].short_edge_length = _test.mapper.augmentations[0].max_size = 64

optimizer.lr, optimizer.params.logit_lr_factor, optimizer.params.weight_decay = 0.006, 0.05, 0.01
lr_multiplier.warmup_iters, lr_multiplier.warmup_epochs = 1, 0.0
model.test_score_thresh = 0.0  # nothing is learned
train.seed = 1
train.device, train.max_iter, train.eval_period, train.checkpointer.period = "cpu", 4, 0, 2
train.max_epochs = train.eval_epochs = train.checkpoint_epochs = train.reference_batch = 0
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path


def data_of(digits):
    """Return the flags that name the data."""
    flags = ([f"--{key}", digits / f"{name}.json", digits / name] for key, name in DATA.items())
    return [word for words in flags for word in words]


@pytest.fixture
def words(config, digits, tmp_path):
    """Return a function that completes a command's words with config, data and output folder."""

    def complete(*words, folder=tmp_path / "run"):
        words = ["--config-file", config, *data_of(digits), *words]
        return [str(word) for word in (*words, f"train.output_dir={folder}")]

    return complete


@pytest.fixture
def lazy(words):
    """Return a function that runs a command line in this process and gives its exit status."""

    def call(*args, **kwargs):
        return run(argument_parser(LAZY).parse_args(words(*args, **kwargs)), LAZY)

    return call


def results(folder):
    """Return the detections that evaluation wrote, by the path in the folder."""
    files = (folder / "inference").rglob("coco_instances_results.json")
    return {path.relative_to(folder): json.loads(path.read_text()) for path in files}


def test_trains_resumes_and_evaluates(lazy, tmp_path, capsys):
    folder = tmp_path / "run"
    assert lazy("train.max_iter=2") == 0
    stored = LazyConfig.load(str(folder / "config.yaml"))
    assert stored.train.max_iter == 2 and stored.model.num_classes == 10

    # The same command again would write over the run.
    assert lazy() == 2
    message = f"error: train.output_dir {folder} already holds config.yaml of a run"
    assert message in capsys.readouterr().err

    assert lazy("--resume") == 0
    after = read_checkpoint(folder / "model_final.pth")
    assert after["iteration"] == 3
    assert yaml.safe_load(after["config"])["train"]["max_iter"] == 4
    states = after["trainer"]["_trainer"]["optimizer"]["state"].values()
    assert {int(state["step"]) for state in states} == {4}
    printed = capsys.readouterr().out
    assert "Starting training from iteration 2" in printed
    assert "Changed since the run was started last: train.max_iter, from 2 to 4." in printed
    assert printed.count("Changed since") == 1

    # Evaluation elsewhere, with the config that the run stored, finds what training found.
    other = tmp_path / "evaluation"
    weights = f"train.init_checkpoint={folder / 'model_final.pth'}"
    arguments = ["--config-file", folder / "config.yaml", weights, f"train.output_dir={other}"]
    assert run_eval(eval_parser().parse_args([str(word) for word in arguments])) == 0
    assert results(other) == results(folder)
    assert [len(found) for found in results(other).values()] == [300]
    shutil.rmtree(folder / "inference")
    assert lazy("--eval-only", "--resume", "train.max_iter=77") == 0
    assert results(folder) == results(other)
    assert LazyConfig.load(str(folder / "config.yaml")).train.max_iter == 4

    # --overwrite never removes what the run starts from, and removes the rest.
    assert lazy("--overwrite", weights) == 2
    assert "train.init_checkpoint" in capsys.readouterr().err
    assert lazy("--overwrite", "train.max_iter=1", "lr_multiplier.warmup_iters=0") == 0
    assert read_checkpoint(folder / "model_final.pth")["iteration"] == 0


@pytest.mark.slow
def test_its_checkpoint_and_its_export_predict_what_evaluation_finds(lazy, digits, tmp_path):
    folder = tmp_path / "run"
    # What is exported of one stage with attention is exported of more.
    assert lazy("model.backbone.bottom_up.attention_stages=[res5]") == 0
    ((_, expected),) = results(folder).items()
    predictor = Predictor.from_checkpoint(folder / "model_final.pth")
    assert predictor.trained.class_names == [str(digit) for digit in range(10)]
    records = json.loads((digits / "val.json").read_text())["images"]
    images = [digits / "val" / record["file_name"] for record in records]
    command = ["--weights", folder / "model_final.pth", "--format", "torchscript"]
    command += ["--output", tmp_path / "exported"]
    assert run_export(export_parser().parse_args([str(word) for word in command])) == 0
    exported = Predictor.from_checkpoint(tmp_path / "exported" / "model.ts")
    assert exported.trained.class_names == predictor.trained.class_names
    for found in (predictor(images), exported(images)):
        for record, instances in zip(records, found, strict=True):
            scores = [entry["score"] for entry in expected if entry["image_id"] == record["id"]]
            assert len(scores) > 10
            scores = sorted(scores, reverse=True)
            assert instances.scores.tolist() == pytest.approx(scores, abs=1e-4)


def test_yaml_and_lazy_runs_are_bit_equal(
    config, digits, plain_torchscript, assert_equal_runs, tmp_path
):
    """With accumulated and clipped gradients, averaged weights and losses in evaluation."""
    weights = tmp_path / "start.pth"
    cfg = load_config(YAML, ["MODEL.RETINANET.NUM_CLASSES", "10"])
    torch.save({"model": Trainer.build_model(cfg).state_dict()}, weights)
    options = {
        "MODEL.WEIGHTS": weights,
        "SEED": 7,
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.ACCUMULATION_STEPS": 2,
        "SOLVER.CLIP_GRADIENTS.ENABLED": True,
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
        "MODEL.EMA.DECAY": 0.5,
        "TEST.EVAL_PERIOD": 2,
        "TEST.VALIDATION_LOSS": True,
        "TEST.BEST_METRIC": "validation/total_loss",
        "TEST.BEST_MODE": "min",
    }
    folders = [tmp_path / "yaml", tmp_path / "lazy"]
    in_yaml = [word for pair in options.items() for word in pair]
    in_yaml += ["OUTPUT_DIR", folders[0], "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0]
    lazy_keys = {YAML_KEYS[name]: key for name, key in LAZY_KEYS.items()}
    in_lazy = [f"{lazy_keys[key]}={value}" for key, value in options.items()]
    in_lazy += [f"train.output_dir={folders[1]}"]
    words = [*data_of(digits), "--config-file"]
    for kind, more in ((defaults.YAML, [YAML, *in_yaml]), (LAZY, [config, *in_lazy])):
        given = [str(word) for word in (*words, *more)]
        assert run(argument_parser(kind).parse_args(given), kind) == 0

    for name in ("model_0000001", "model_best", "model_final"):
        assert_equal_runs(*folders, name=name)
    assert results(folders[0]) == results(folders[1])
    assert [len(found) for found in results(folders[0]).values()] == [300, 300]


@pytest.mark.slow
def test_processes_execute_the_config_and_stop_and_one_goes_on(
    config, digits, start, read_until, tmp_path, capsys
):
    """The data sets are registered by the config itself."""
    register = "from sasa_det.data import register_coco\n"
    for key, name in DATA.items():
        register += f"register_coco('lazy_{key}', '{digits / name}.json', '{digits / name}')\n"
        register += f"dataloader.{key}.dataset.names = 'lazy_{key}'\n"
    config.write_text(f"{CONFIG}\n{register}model.num_classes = 10\n")
    folder = tmp_path / "run"
    arguments = ["tools/lazyconfig_train_net.py", "--config-file", config]
    options = ["dataloader.train.total_batch_size=4", "train.checkpointer.period=2"]
    options.append(f"train.output_dir={folder}")
    tool, *given = arguments
    endless = ["--num-gpus", 2, "--dist-url", "auto", *options, "train.max_iter=100000"]
    process = start(*endless, tool=tool, data=given)
    read_until(process, "Saving checkpoint")
    process.send_signal(signal.SIGTERM)
    rest = process.communicate()[0]
    assert process.returncode == 143, rest
    assert "SIGTERM was received; everything is saved" in rest
    last = int(Path((folder / "last_checkpoint").read_text()).stem.removeprefix("model_"))

    words = [*arguments[1:], "--resume", *options, f"train.max_iter={last + 3}"]
    assert run(argument_parser(LAZY).parse_args([str(word) for word in words]), LAZY) == 0
    assert f"Starting training from iteration {last + 1}" in capsys.readouterr().out
    assert read_checkpoint(folder / "model_final.pth")["iteration"] == last + 2


MISTAKES = {
    "pairs": (["train.max_iter", "4"], "must be key=value, got 'train.max_iter'"),
    "flag": (["train.max_iter=4", "--resume"], "flags come before the key=value pairs"),
    "key": (["train.max_itre=4"], "train.max_itre does not exist; did you mean train.max_iter?"),
    "added key": (["+train.max_itre=4"], "did you mean train.max_iter?"),
    "key of a call": (
        ["model.backbone.bottom_up.attention.kernel_sise=5"],
        "did you mean model.backbone.bottom_up.attention.kernel_size?",
    ),
    "grammar": (["train.max_iter=[4"], "the override 'train.max_iter=[4' cannot be applied"),
    "type": (["train.max_iter=four"], "train.max_iter must be an integer, got 'four'."),
    "section": (["model=null"], "model must be a section of keys, got None."),
    "list": (["train.weights_allow=[[a]]"], "train.weights_allow must be a list of strings"),
    "value": (["train.max_iter=0"], "train.max_iter must be at least 1, got 0."),
    "interpolation": (["train.max_iter=${train.end}"], "train.end"),
    "argument": (["+dataloader.train.num_wokers=4"], "dataloader.train: got an unexpected key"),
    "argument of the model": (["+model.depth=50"], "unexpected keyword argument 'depth'"),
    "model": (["model.backbone.bottom_up.attention.kernel_size=4"], "kernel_size must be odd"),
    "stage": (["train.activation_checkpointing=[res9]"], "train.activation_checkpointing"),
    "classes": (["model.num_classes=3"], "model.num_classes is 3 but"),
    "device": (["train.device=cuda:77"], "train.device is cuda:77 but"),
    "weights": (["train.init_checkpoint=nowhere.pth"], "train.init_checkpoint nowhere.pth does"),
    "evaluation": (["--eval-only"], "--eval-only needs weights: set train.init_checkpoint"),
    "norms": (
        ["--num-gpus", "2", "model.head.norm=SyncBN"],
        "model.head.norm must not be SyncBN where several processes train on CPUs",
    ),
    "processes": (
        ["--num-gpus", "3"],
        "dataloader.train.total_batch_size must be a multiple of the number of processes times "
        "train.accumulation_steps, which is 3",
    ),
    "norm": (["model.head.norm=Nope"], "model.head.norm must be a norm of detectron2"),
    "number for a list": (["train.weights_allow=5"], "train.weights_allow must be a list of"),
    "truth value for a list": (
        ["dataloader.train.dataset.names=true"],
        "dataloader.train.dataset.names must be a list of strings, got True.",
    ),
    "word for a truth value": (
        ["train.amp.enabled=yes"],
        "train.amp.enabled must be True or False, got 'yes'.",
    ),
    "evaluator": (["dataloader.evaluator=null"], "the config does not fit together"),
    "mapper": (["dataloader.test.mapper=null"], "dataloader.test.mapper must be the call that"),
    "no value for the classes": (["model.num_classes=null"], "model.num_classes must have a value"),
    "one image of one pixel": (
        ["dataloader.train.total_batch_size=1", "+dataloader.train.mapper.recompute_boxes=false"],
        "has one value per channel",
    ),
    "nothing to resume": (["--resume"], "holds no checkpoint to resume"),
    "both": (["--resume", "auto", "--overwrite"], "--resume and --overwrite exclude each other"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_any_work(mistake, lazy, tmp_path, capsys):
    given, message = MISTAKES[mistake]
    assert lazy(*given) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith("error: ") and "\n" not in error
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def loaded(digits, tmp_path_factory):
    """The config as :func:`load_lazy_config` reads it, with the data as it takes them."""
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(CONFIG)
    data = {f: (str(digits / f"{n}.json"), str(digits / n)) for f, n in DATA.items()}
    return load_lazy_config(str(path), **data), data


@pytest.mark.parametrize("field", [name for name in LAZY_KEYS if name != "meta_architecture"])
def test_every_key_needs_a_value_and_may_be_left_out(field, config, loaded):
    key = LAZY_KEYS[field]
    options, data = loaded
    if not key.endswith(("_json", "_images")):
        with pytest.raises(UsageError, match=rf"^{key} must have a value, got None\.$"):
            load_lazy_config(str(config), [f"+{key}=null"], **data)
    left = copy.deepcopy(options.config)
    section, _, name = key.rpartition(".")
    part = OmegaConf.select(left, section)
    if name in part:
        part.pop(name)
    left_out = RunOptions.read(left)
    # Worked out for the run, it is found by all that reads the config.
    value = getattr(options, field)
    changed = RunOptions.read(left_out.replace(**{field: value}).config)
    if not key.startswith(("optimizer.", "lr_multiplier.")):
        assert getattr(changed, field) == value


def test_a_run_without_a_seed_draws_the_seed_of_its_data_too(config, lazy, tmp_path):
    config.write_text(CONFIG.replace("train.seed = 1", "del train['seed']"))
    drawn = set()
    for name in ("one", "other"):
        folder = tmp_path / name
        assert lazy("train.max_iter=1", "lr_multiplier.warmup_iters=0", folder=folder) == 0
        state = read_checkpoint(folder / "model_final.pth")["trainer"]["_trainer"]
        assert state["seed"] == state["data_loader"]["seed"]
        drawn.add(state["seed"])
    assert len(drawn) == 2


def test_the_number_of_classes_may_be_left_out(config, lazy, tmp_path):
    config.write_text(f"{CONFIG}\ndel model['num_classes']\n")
    assert lazy("train.max_iter=1", "lr_multiplier.warmup_iters=0") == 0
    assert LazyConfig.load(str(tmp_path / "run" / "config.yaml")).model.num_classes == 10


def test_a_norm_may_be_a_class_or_a_function(config, lazy, tmp_path):
    norms = "import torch\nmodel.backbone.norm = torch.nn.BatchNorm2d\n"
    norms += "model.head.norm = lambda channels: torch.nn.GroupNorm(4, channels)\n"
    config.write_text(f"{CONFIG}\n{norms}")
    assert lazy("train.max_iter=1", "lr_multiplier.warmup_iters=0") == 0


FILES = {
    "nothing": (None, "does not exist"),
    "syntax": ("model = (\n", "small.py, line 1: SyntaxError: '(' was never closed"),
    "name": ("a = 1\nmodel = b\n", "small.py, line 2: NameError: name 'b' is not defined"),
    "import": ("from .nowhere import model\n", "small.py, line 1: ImportError: Cannot import name"),
    "in an import": ("from .other import model\n", "other.py, line 3: ZeroDivisionError"),
    "sections": ("model = dict()\n", "small.py has no dataloader and no lr_multiplier and no"),
    "kind": (f"{CONFIG}train.log_periods = 20\n", "config key train.log_periods does not exist"),
}


@pytest.mark.parametrize("file", FILES)
def test_mistakes_in_the_file_are_told_with_their_line(file, config, lazy, tmp_path, capsys):
    text, message = FILES[file]
    config.unlink() if text is None else config.write_text(text)
    (tmp_path / "other.py").write_text("a = 0\n\nmodel = 1 / a\n")
    replaced = builtins.__import__
    assert lazy() == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith("error: ") and "\n" not in error
    assert builtins.__import__ is replaced
    assert not (tmp_path / "run").exists()


def test_a_yaml_config_is_for_the_other_command(tmp_path, capsys):
    for text in ("VERSION: 2", "train: !!python/object/apply:os.getcwd []"):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        assert run(argument_parser(LAZY).parse_args(["--config-file", str(path)]), LAZY) == 2
        error = capsys.readouterr().err
        assert "is for sasa-det train" in error or "is not allowed" in error


def test_a_resumed_run_keeps_model_and_data(lazy, tmp_path, capsys):
    assert lazy("train.max_iter=1", "lr_multiplier.warmup_iters=0") == 0
    stored = (tmp_path / "run" / "config.yaml").read_text()
    capsys.readouterr()
    changes = [
        "model.backbone.bottom_up.attention.kernel_size=5", "train.seed=5",
        "optimizer.params.logit_lr_factor=0.1", "dataloader.train.dataset.filter_empty=false",
    ]  # fmt: skip
    for change in changes:
        key, _, value = change.partition("=")
        assert lazy("--resume", change) == 2
        error = capsys.readouterr().err
        assert f"cannot be resumed with a change of {key} (from " in error
        assert f"to {value.title() if value == 'false' else value}); give the old values" in error
    assert (tmp_path / "run" / "config.yaml").read_text() == stored
    # Half an epoch of 8 images in batches of 2.
    assert lazy("--resume", "train.max_epochs=0.5", "optimizer.lr=0.001") == 0
    assert read_checkpoint(tmp_path / "run" / "model_final.pth")["iteration"] == 1


def test_another_evaluator(config, lazy, tmp_path, capsys):
    """Its metrics are not known before it was called."""
    counter = """
from detectron2.config import LazyCall
from detectron2.evaluation import DatasetEvaluator

class Counter(DatasetEvaluator):
    def __init__(self, dataset_name, output_dir):
        self.number = 0

    def process(self, inputs, outputs):
        self.number += len(inputs)

    def evaluate(self):
        return {"counted": {"images": self.number}}

dataloader.evaluator = LazyCall(Counter)()
"""
    short = ["train.max_iter=1", "lr_multiplier.warmup_iters=0"]
    assert lazy(*short, "train.best_metric=counted/images") == 2
    assert "train.best_metric must be a metric of the evaluations" in capsys.readouterr().err
    config.write_text(f"{CONFIG}\n{counter}")
    assert lazy(*short, "train.best_metric=counted/images") == 0
    assert "counted/images is best: 3." in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_run(lazy, tmp_path, capsys):
    assert lazy("optimizer.lr=1e30", "train.max_iter=40", "train.checkpointer.period=40") == 1
    assert "nothing was saved" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.pth"))


LAZY_CONFIGS = sorted(Path("configs/COCO-Detection").glob("*.py"))


@pytest.mark.parametrize("path", LAZY_CONFIGS, ids=lambda path: path.stem)
def test_configs_have_the_keys_that_detectron2s_script_reads(path):
    """With the calls that its tools/lazyconfig_train_net.py makes of them."""
    train = LazyConfig.load(str(path)).train
    model = torch.nn.Linear(1, 1)
    assert create_ddp_model(model, **train.ddp) is model  # there is one process
    periodic = PeriodicCheckpointer(DetectionCheckpointer(model), **train.checkpointer)
    assert periodic.max_to_keep == 100
    assert hooks.PeriodicWriter([], period=train.log_period)._period == 20
    keys = ("output_dir", "init_checkpoint", "max_iter", "eval_period", "device")
    assert not {key for key in keys if key not in train} and train.amp.enabled is False


def test_a_warmup_longer_than_the_run_is_warned_of(caplog):
    """In detectron2's script, which checks nothing before it trains."""
    cfg = LazyConfig.load(str(LAZY_CONFIGS[-1]))
    cfg.train.max_iter, cfg.lr_multiplier.warmup_iters = 3, 3
    schedule = instantiate(cfg.lr_multiplier)
    assert [schedule(step / 3) for step in range(3)] == [0, 0, 0]
    assert "warmup_iters should be below train.max_iter, 3, got 3: the learning" in caplog.text
    caplog.clear()
    cfg.lr_multiplier.warmup_iters = 1
    assert instantiate(cfg.lr_multiplier)(1 / 3) > 0 and not caplog.records


def test_detectron2s_script_trains_and_evaluates(config, digits, tmp_path, unregister):
    for split in ("train", "val"):
        unregister.append(f"small_{split}")
        register_coco(f"small_{split}", digits / f"{split}.json", digits / split)
    cfg = LazyConfig.load(str(config))
    overrides = ["dataloader.train.dataset.names=small_train", "model.num_classes=10"]
    overrides += ["dataloader.test.dataset.names=small_val", "train.max_iter=2"]
    cfg = LazyConfig.apply_overrides(cfg, [*overrides, f"train.output_dir={tmp_path}"])
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    trainer = SimpleTrainer(model, instantiate(cfg.dataloader.train), instantiate(cfg.optimizer))
    checkpointer = DetectionCheckpointer(model, str(tmp_path), trainer=trainer)
    evaluated = []

    def evaluate():
        loader = instantiate(cfg.dataloader.test)
        results = inference_on_dataset(model, loader, instantiate(cfg.dataloader.evaluator))
        evaluated.append(results)
        return results

    chain = [
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
        hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer),
        hooks.EvalHook(cfg.train.eval_period, evaluate),
    ]
    trainer.register_hooks(chain)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=False)
    trainer.train(0, cfg.train.max_iter)
    assert set(evaluated[0]["bbox"]) >= {"AP", "AP50", "AP-3"}
    assert (tmp_path / "model_final.pth").is_file()


def test_the_period_of_the_log_is_that_of_the_config(lazy, tmp_path):
    assert lazy("train.log_period=1", "train.max_iter=3") == 0
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 1, 2]


def test_a_config_of_an_earlier_version_keeps_its_epochs(config, digits):
    config.write_text(f"{CONFIG}\ndel train['checkpoint_epochs']\n"
                      "train.checkpointer['epochs'] = 5.0\n")  # fmt: skip
    data = ([digits / f"{split}.json", digits / split] for split in DATA.values())
    options = load_lazy_config(str(config), [], *data)
    assert options.checkpoint_epochs == 5.0 and "epochs" not in options.config.train.checkpointer

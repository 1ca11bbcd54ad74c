"""The yaml configs of COCO have LazyConfigs of their names that say the same."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from omegaconf import ListConfig
from torch import nn

from sasa_det import add_sasa_config
from sasa_det.config.keys import flatten
from sasa_det.config.lazy import _DDP, load_lazy_config
from sasa_det.config.options import LAZY_KEYS, YAML_KEYS, RunOptions
from sasa_det.data import build_test_mapper, build_train_mapper, write_digits
from sasa_det.engine import Trainer, load_config
from sasa_det.engine.schedule import in_iterations, scale_learning_rate
from sasa_det.engine.trainer import LazyTrainer

# Of the detectors on SANs, which change a value of each other, the RetinaNets on the smallest.
CONFIGS = sorted(
    path
    for path in Path(__file__).parents[2].glob("configs/COCO-*/*.yaml")
    if "SAN" not in path.name or path.name.startswith("retinanet_SAN10_")
)
each_pair = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = write_digits(tmp_path_factory.mktemp("data") / "digits", num_train=6, num_val=2)
    splits = {"train": "train", "test": "val"}
    return {key: (str(folder / f"{name}.json"), str(folder / name)) for key, name in splits.items()}


def load_options(path, opts=(), overrides=(), **data):
    """Read both configs, to run on the CPU."""
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu", *opts], **data)
    words = ["train.device=cpu", *overrides]
    return RunOptions.read(cfg), load_lazy_config(str(path.with_suffix(".py")), words, **data)


def load_pair(path, *args, **data):
    return (options.config for options in load_options(path, *args, **data))


def worked_out(options, num_images):
    return in_iterations(scale_learning_rate(options), num_images)


def describe(value, path=""):
    """Map the paths of all that an object is made of to types, numbers, strings and shapes."""
    described = {path: type(value)}
    if isinstance(value, torch.Tensor):
        small = value.numel() < 100 and not value.requires_grad
        return {path: (value.shape, value.tolist() if small else None)}
    if isinstance(value, nn.Module):
        # Without lists of layers that are attributes as well.
        own = {k: v for k, v in vars(value).items() if k not in vars(nn.Module())}
        parts = {k: v for k, v in own.items() if not holds_modules(v)}
        parts.pop("recipe_keys", None)  # of yaml configs
        parts |= value._parameters | value._buffers | value._modules
    elif isinstance(value, Mapping):
        parts, described = value, {path: "mapping"}
    elif isinstance(value, (list, tuple, ListConfig)):
        parts, described = dict(enumerate(value)), {path: "list"}
    elif hasattr(value, "__qualname__"):
        return {path: value.__qualname__}
    elif hasattr(value, "__dict__"):
        parts = vars(value)
    else:
        return {path: value}
    for key, part in parts.items():
        described |= describe(part, f"{path}/{key}")
    return described


def holds_modules(value):
    return isinstance(value, (list, tuple)) and any(isinstance(v, nn.Module) for v in value)


def test_these_yaml_configs_have_lazy_twins_and_there_are_no_others():
    lazy = sorted(Path(__file__).parents[2].glob("configs/COCO-*/*.py"))
    assert [path.with_suffix(".yaml") for path in lazy] == CONFIGS and len(CONFIGS) == 8


def test_every_key_of_a_run_has_a_lazy_key():
    cfg = get_cfg()
    detectron2 = set(flatten(cfg))
    add_sasa_config(cfg)
    # What is said by calls.
    calls = ("MODEL.SASA.", "INPUT.JITTER.", "SOLVER.OPTIMIZER", "SOLVER.LOGIT_LR_FACTOR")
    calls += ("SOLVER.STEP_EPOCHS", "SOLVER.WEIGHT_DECAY_EMBEDDING")
    calls += ("SOLVER.STEM_LOGIT_LR_FACTOR", "SOLVER.WEIGHT_DECAY_LOGIT")
    calls += ("SOLVER.LINEAR_LR_FACTOR",)
    calls += ("MODEL.SAN.", "MODEL.BN_DECAY")
    # Classifiers have yaml configs alone.
    calls += ("MODEL.CLASSIFIER.", "INPUT.CLASSIFICATION.", "TEST.IMS_PER_BATCH")
    calls += ("DATASETS.IMAGE_FOLDER", "DATASETS.HOLDOUT")
    added = {key for key in set(flatten(cfg)) - detectron2 if not key.startswith(calls)}
    assert added <= {YAML_KEYS[name] for name in LAZY_KEYS}
    in_train = flatten(load_lazy_config(str(CONFIGS[0].with_suffix(".py"))).config.train, "train.")
    expected = {key for key in LAZY_KEYS.values() if key.startswith("train.")}
    assert set(in_train) - expected == {f"train.ddp.{name}" for name in _DDP}
    assert expected <= set(in_train)


@each_pair
def test_runs_are_equal(path):
    """Lengths, batch, precision, clipping, checkpoints, evaluation, data sets, workers, folder."""
    options, lazy = load_options(path)
    # 0 for all is not known to detectron2's checkpointer, which keeps 100.
    assert (options.max_checkpoints, lazy.max_checkpoints) == (0, 100)
    for name in LAZY_KEYS.keys() - {"max_checkpoints"}:
        value, in_lazy = getattr(options, name), getattr(lazy, name)
        assert type(value) is type(in_lazy) and value == in_lazy, name
    assert options.num_classes == lazy.num_classes


@each_pair
def test_models_and_optimizers_are_equal(path):
    # With COCO's number of images.
    cfg, lazy = (worked_out(options, 117266).config for options in load_options(path))
    models = [Trainer.build_model(cfg), LazyTrainer.build_model(lazy)]
    shapes = [{name: t.shape for name, t in model.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1]
    assert describe(models[0]) == describe(models[1])

    optimizers = [
        Trainer.build_optimizer(cfg, models[0]),
        LazyTrainer.build_optimizer(lazy, models[1]),
    ]
    assert type(optimizers[0]) is type(optimizers[1])
    settings = [parameter_settings(*pair) for pair in zip(optimizers, models, strict=True)]
    assert settings[0] == settings[1]
    assert len(settings[0]) == len(list(models[0].parameters()))

    schedulers = [
        Trainer.build_lr_scheduler(cfg, optimizers[0]),
        LazyTrainer.build_lr_scheduler(lazy, optimizers[1]),
    ]
    end = cfg.SOLVER.MAX_ITER
    marks = [0, 1, cfg.SOLVER.WARMUP_ITERS, *cfg.SOLVER.STEPS, end]
    around = [mark + offset for mark in marks for offset in (-1, 0, 1)]
    rates = [[rates_at(scheduler, i) for i in (*around, *range(0, end, 997))]
             for scheduler in schedulers]  # fmt: skip
    assert rates[0] == rates[1]
    assert len({tuple(rate) for rate in rates[0]}) > 5


# Overrides of detectors in epochs of 3000 images, and of the 3x schedule.
LENGTHS = {
    "SOLVER.MAX_EPOCHS": (12.0, 1700.0),
    "SOLVER.MAX_ITER": (2000, 260000),
    "SOLVER.IMS_PER_BATCH": (16, 8),
    "SOLVER.WARMUP_EPOCHS": (2.5, 3.0),
    "SOLVER.WARMUP_ITERS": (100, 10),
    "SOLVER.WARMUP_FACTOR": (0.5, 0.1),
    "SOLVER.WARMUP_METHOD": ("constant", "constant"),
}
CHANGES = [
    *([key] for key in LENGTHS),
    ["SOLVER.MAX_EPOCHS", "SOLVER.IMS_PER_BATCH"],
    ["SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS", "SOLVER.IMS_PER_BATCH"],
]


@pytest.mark.parametrize("keys", CHANGES, ids=lambda keys: "-".join(keys).replace("SOLVER.", ""))
@pytest.mark.parametrize("path", [CONFIGS[-1], CONFIGS[0]], ids=lambda path: path.stem)
def test_schedules_are_equal_whatever_is_overridden(path, keys):
    column = int("mask_rcnn" in path.stem)
    given = {key: str(LENGTHS[key][column]) for key in keys}
    lazy_keys = {YAML_KEYS[name]: key for name, key in LAZY_KEYS.items()}
    pair = load_options(
        path,
        [word for pair in given.items() for word in pair],
        [f"{lazy_keys[key]}={value}" for key, value in given.items()],
    )
    options, lazy = (worked_out(part, 3000) for part in pair)
    end, cfg = options.max_iter, options.config
    assert end == lazy.max_iter and options.base_lr == lazy.base_lr
    warmup = options.warmup_iters
    assert 0 < warmup < end
    # All of the warmup, all around the steps, and every 97th of the rest.
    around = [i for step in cfg.SOLVER.STEPS for i in range(step - 50, step + 50)]
    dense = [*range(min(warmup + 50, end)), *(i for i in around if 0 <= i < end)]
    iterations = sorted({*dense, *range(0, end, 97)})
    rates = []
    for build, part in ((Trainer, options), (LazyTrainer, lazy)):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], part.base_lr)
        multiplier = build.build_lr_scheduler(part.config, optimizer)._multiplier
        rates.append([multiplier(i / end) for i in iterations])
    assert rates[0] == rates[1]
    # The warmup is as long as it says, to the iteration.
    rising = [rates[0][i] < rates[0][i + 1] for i in range(warmup + 1)]
    expected = [cfg.SOLVER.WARMUP_METHOD == "linear"] * warmup
    assert rising[: warmup - 1] == expected[1:] and not rising[warmup]


def parameter_settings(optimizer, model):
    """Map every parameter's name to its rate, decay, momentum and so on."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def rates_at(scheduler, iteration):
    scheduler.last_epoch = min(max(iteration, 0), scheduler._max_iter)
    return scheduler.get_lr()


@each_pair
def test_input_is_equal(path, digits):
    """The mappers, and the images that come out of them."""
    cfg, lazy = load_pair(path)
    mappers = [build_train_mapper(cfg), instantiate(lazy.dataloader.train.mapper)]
    assert describe(mappers[0]) == describe(mappers[1])
    mappers = [build_test_mapper(cfg), instantiate(lazy.dataloader.test.mapper)]
    for name in ("is_train", "image_format", "augmentations", "max_pixels"):
        assert describe(getattr(mappers[0], name)) == describe(getattr(mappers[1], name))

    cfg, lazy = load_pair(
        path,
        ["SOLVER.IMS_PER_BATCH", "4", "DATALOADER.NUM_WORKERS", "0", "MODEL.MASK_ON", "False"],
        [
            "dataloader.train.total_batch_size=4",
            "dataloader.train.num_workers=0",
            "dataloader.train.mapper.use_instance_mask=false",
        ],
        **digits,
    )
    loaders = [Trainer.build_train_loader(cfg), LazyTrainer.build_train_loader(lazy)]
    for batch, lazy_batch in zip(*(islice(loader, 3) for loader in loaders), strict=True):
        assert_equal_samples(batch, lazy_batch)
    name = digits["test"][0]
    loaders = [Trainer.build_test_loader(cfg, name), LazyTrainer.build_test_loader(lazy, name)]
    for batch, lazy_batch in zip(*loaders, strict=True):
        assert_equal_samples(batch, lazy_batch)
    evaluators = [Trainer.build_evaluator(cfg, name), LazyTrainer.build_evaluator(lazy, name)]
    for attribute in (
        "__class__",
        "_output_dir",
        "_use_fast_impl",
        "_tasks",
        "_max_dets_per_image",
    ):
        found = [getattr(evaluator, attribute) for evaluator in evaluators]
        assert found[0] == found[1], attribute


def assert_equal_samples(samples, others):
    for sample, other in zip(samples, others, strict=True):
        assert sample["file_name"] == other["file_name"]
        assert torch.equal(sample["image"], other["image"])
        if "instances" in sample:
            boxes = [s["instances"].gt_boxes.tensor for s in (sample, other)]
            assert torch.equal(*boxes)


@each_pair
def test_what_a_run_stores_is_the_config(path, tmp_path):
    options = load_lazy_config(str(path.with_suffix(".py")), ["train.max_iter=77"])
    assert options.max_epochs == 0  # which would go before it
    stored = tmp_path / "config.yaml"
    stored.write_text(options.dump())
    again = load_lazy_config(str(stored))
    assert again.max_iter == 77 and again.dump() == options.dump()
    # detectron2 reads it as well.
    assert LazyConfig.load(str(stored)) == again.config

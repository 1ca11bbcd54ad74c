"""Training of classifiers, as a person does it: folders of images, and every mistake in them."""

import json
import signal

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from PIL import Image

from sasa_det.engine import load_config
from sasa_det.engine.defaults import CLASSIFIER, argument_parser, run
from sasa_det.engine.distributed import _parts
from sasa_det.engine.train_loop import StepTrainer

CONFIG = "configs/Quick/classifier_SASA.yaml"
CLASSES = [f"{shape}_{angle}" for shape in ("lines", "waves") for angle in (0, 45, 90, 135)]


def pattern(name, rng):
    """Draw noisy lines or double lines of some direction."""
    shape, angle = name.split("_")
    y, x = np.mgrid[:40, :40]
    phase = x * np.cos(np.radians(int(angle))) + y * np.sin(np.radians(int(angle)))
    period = 4 if shape == "lines" else 10
    wave = np.sin(2 * np.pi * phase / period + rng.uniform(0, 2 * np.pi))
    image = 128 + 60 * wave[..., None] + rng.normal(0, 15, (40, 40, 3))
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def write_folder(root, classes=CLASSES, train=4, val=2):
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pattern(name, rng).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data")


@pytest.fixture
def command(folder, tmp_path):
    """Return a function that runs a command line and gives its exit status."""

    def call(*words):
        words = ["--config-file", CONFIG, "--data", folder, *words]
        words += ["OUTPUT_DIR", tmp_path / "run"]
        parser = argument_parser(CLASSIFIER)
        return run(parser.parse_args([str(word) for word in words]), CLASSIFIER)

    return call


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_trains_evaluates_and_resumes(command, tmp_path):
    run = tmp_path / "run"
    assert command() == 0
    last = metrics(run)[-1]
    assert last["classification/images"] == last["ema/classification/images"] == 16
    assert 0 <= last["classification/top1"] <= last["classification/top5"] <= 100
    assert command("--resume", "SOLVER.MAX_ITER", 6) == 0
    assert torch.load(run / "model_final.pth", weights_only=True)["iteration"] == 5
    assert command("--eval-only", "--resume") == 0


def test_holds_out_a_share_of_each_class(command, folder, tmp_path):
    for path in (folder / "val").rglob("*.png"):
        path.unlink()
    assert command("--holdout", "0.25") == 0
    assert metrics(tmp_path / "run")[-1]["classification/images"] == len(CLASSES)
    # The same images are held out when the run goes on.
    assert command("--holdout", "0.25", "--resume", "SOLVER.MAX_ITER", 5) == 0


@pytest.mark.slow
def test_learns_eight_classes(tmp_path):
    data = write_folder(tmp_path / "many", train=20, val=10)
    words = [
        "--config-file", CONFIG, "--data", data, "SOLVER.MAX_ITER", 80, "SOLVER.IMS_PER_BATCH", 16,
        "SOLVER.WARMUP_ITERS", 5, "SOLVER.CHECKPOINT_PERIOD", 1000, "OUTPUT_DIR", tmp_path / "run",
    ]  # fmt: skip
    parser = argument_parser(CLASSIFIER)
    assert run(parser.parse_args([str(word) for word in words]), CLASSIFIER) == 0
    assert metrics(tmp_path / "run")[-1]["classification/top1"] > 90


@pytest.mark.slow
def test_an_interrupted_run_is_bit_equal(
    start, read_until, command, plain_torchscript, assert_equal_runs, folder, tmp_path
):
    """With any number of processes that read the data."""
    options = [
        "SEED", 3, "SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 3,
        "SOLVER.ACCUMULATION_STEPS", 2, "TEST.EVAL_PERIOD", 4,
    ]  # fmt: skip
    for number, status, moment, num_workers in (
        (signal.SIGKILL, -signal.SIGKILL, "Saving checkpoint", 2),
        (signal.SIGTERM, 143, "inference", 0),
    ):
        process = start(
            *("--resume", "auto"), *options, "DATALOADER.NUM_WORKERS", num_workers,
            *("OUTPUT_DIR", tmp_path / "run"),
            tool="tools/train_imagenet.py", data=["--config-file", CONFIG, "--data", folder],
        )  # fmt: skip
        output = read_until(process, moment)
        process.send_signal(number)
        output += process.communicate()[0]
        assert process.returncode == status, output
    assert command("--resume", *options, "DATALOADER.NUM_WORKERS", 2) == 0
    (tmp_path / "run").rename(tmp_path / "interrupted")
    assert command(*options) == 0
    assert_equal_runs(tmp_path / "run", tmp_path / "interrupted")


def test_accumulation_equals_the_whole_batch():
    cfg = load_config(CONFIG, ["MODEL.RESNETS.NORM", ""])
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (64,), generator=generator)

    def trained(parts):
        torch.manual_seed(0)
        model = build_model(cfg).double()
        size = 64 // parts
        batches = [
            {"image": i, "label": c, "file_name": [""] * size}
            for i, c in zip(images.split(size), labels.split(size), strict=True)
        ]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        trainer = StepTrainer(model, 2 * batches, optimizer, seed=0, accumulation_steps=parts)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with EventStorage():
            for trainer.iter in range(2):
                trainer.run_step()
        return before, list(model.parameters())

    before, whole = trained(1)
    _, parts = trained(4)
    moved = [(a - b).abs().max() for a, b in zip(before, whole, strict=True)]
    assert min(moved) > 1e-9
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def test_an_unreadable_image_is_skipped_and_counted(tmp_path, caplog):
    data = write_folder(tmp_path / "data", classes=CLASSES[:2], train=100, val=100)
    for split in ("train", "val"):
        truncate(data / split / CLASSES[0] / "7.png")
    words = [
        "--config-file", CONFIG, "--data", data, "SOLVER.MAX_ITER", 30, "OUTPUT_DIR",
        tmp_path / "run",
    ]  # fmt: skip
    parser = argument_parser(CLASSIFIER)
    assert run(parser.parse_args([str(word) for word in words]), CLASSIFIER) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"Skipped: image {data / 'train' / CLASSES[0] / '7.png'} cannot be read" in log
    assert "1 of at most 2" in log
    last = metrics(tmp_path / "run")[-1]
    assert (last["classification/images"], last["classification/unreadable"]) == (199, 1)


def test_too_many_unreadable_images_end_the_run_with_their_names(tmp_path, capsys):
    data = write_folder(tmp_path / "data", classes=CLASSES[:2], train=50, val=2)
    for number in (3, 4):
        truncate(data / "train" / CLASSES[0] / f"{number}.png")
    # With this seed, not both of them are in the first batch.
    words = [
        "--config-file", CONFIG, "--data", data, "SOLVER.MAX_ITER", 60, "SEED", 1, "OUTPUT_DIR",
        tmp_path / "run",
    ]  # fmt: skip
    parser = argument_parser(CLASSIFIER)
    assert run(parser.parse_args([str(word) for word in words]), CLASSIFIER) == 1
    error = capsys.readouterr().err
    assert "3.png" in error and "4.png" in error and "SKIP_UNREADABLE" in error
    # What was trained up to there is kept.
    assert (tmp_path / "run" / "last_checkpoint").is_file()


def rename(path):
    path.rename(path.with_name("stripes_0"))


def empty(path):
    for image in path.iterdir():
        image.unlink()


MISTAKES = {
    "no train": (lambda root: (root / "train").rename(root / "training"), "train"),
    "no val": (lambda root: (root / "val").rename(root / "validation"), "val"),
    "a class without images": (lambda root: empty(root / "train" / CLASSES[2]), CLASSES[2]),
    "other classes": (lambda root: rename(root / "val" / CLASSES[0]), "stripes_0"),
    "fewer classes": (
        lambda root: (root / "val" / CLASSES[0]).rename(root / "gone"),
        CLASSES[0],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_the_folder_are_told_before_any_work(
    mistake, command, folder, tmp_path, capsys
):
    make, named = MISTAKES[mistake]
    make(folder)
    assert command() == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error and named in error
    assert str(folder) in error
    assert not (tmp_path / "run").exists()


def test_mistakes_in_the_command(command, folder, tmp_path, capsys):
    def told(*words):
        assert command(*words) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and "\n" not in error
        assert not (tmp_path / "run").exists()
        return error

    assert "MODEL.CLASSIFIER.NUM_CLASSES is 10" in told("MODEL.CLASSIFIER.NUM_CLASSES", 10)
    detector = "configs/Quick/retinanet_SASA.yaml"
    assert "must be Classifier here, got AttentionRetinaNet" in told("--config-file", detector)
    assert "did you mean classification/top1" in told("TEST.BEST_METRIC", "clasification/top1")
    sampler = ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")
    assert "DATALOADER.SAMPLER_TRAIN must be TrainingSampler" in told(*sampler)


@pytest.mark.parametrize("words", [("--holdout", "1.5"), ("--holdout", "few"), ("--data", "")])
def test_flags_that_make_no_sense(command, capsys, words):
    with pytest.raises(SystemExit) as end:
        command(*words)
    assert end.value.code == 2
    assert f"argument {words[0]}: must be a" in capsys.readouterr().err


def test_weights_of_another_architecture_and_hostile_ones(command, tmp_path, capsys):
    import pickle

    other = tmp_path / "other.pth"
    torch.save({"model": {"backbone.res2.0.conv1.weight": torch.zeros(3, 3)}}, other)
    cut = tmp_path / "cut.pth"
    cut.write_bytes(other.read_bytes()[:-100])
    marker = tmp_path / "executed"

    class Hostile:
        def __reduce__(self):
            return open, (str(marker), "w")

    hostile = tmp_path / "hostile.pth"
    hostile.write_bytes(pickle.dumps({"model": Hostile()}))
    for path, words in {
        other: "does not fit the model",
        cut: "cut.pth",
        hostile: "hostile",
    }.items():
        assert command("MODEL.WEIGHTS", path) == 2
        error = capsys.readouterr().err.strip()
        assert words in error and error.startswith("error: ") and "\n" not in error
    assert not marker.exists()


def test_the_head_in_a_backbone_is_no_part_to_shard_of_its_own():
    model = build_model(load_config(CONFIG))
    assert model.head is model.backbone.linear
    parts = _parts(model)
    assert model.backbone in parts and model.head not in parts

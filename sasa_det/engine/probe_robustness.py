"""How well classifiers keep their accuracy on changed images, from a command line."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..analysis.robustness_figure import draw_robustness
from ..command_line import positive_int
from ..config.load import load_config
from ..config_files import CONFIGS
from ..data.catalog import num_classes_of
from ..data.image_folder import check_image_folders, register_image_folder
from ..errors import UsageError
from ..evaluation.robustness import Attack, probe_classifier
from ..utils.cores import available_cores
from ..utils.files import write_text
from ..utils.machine import default_device, describe_machine
from .comparison import rates_table
from .defaults import flush_denormals, log_to
from .experiments import Experiments
from .outputs import check_output_folder, explained
from .robustness_report import robustness_report
from .studies import Study, Variant, run_study
from .tasks import task_of
from .trained_model import TrainedModel, load_trained_model

logger = logging.getLogger(__name__)

_EPILOG = """
The settings of the attack are this project's choice, not the paper's. KEY VALUE pairs override the
configs of the classifiers, or of their trainings.
"""
_RESULTS = _NUMBERS, _TABLES, _FIGURE = "robustness.json", "robustness.md", "robustness.png"

# What --train trains: networks of the same depths and widths. SANs learn at lower rates.
_SAN = {"MODEL.BACKBONE.NAME": "build_san_backbone"}
_SAN_RATES = (0.002, 0.004, 0.008)
CLASSIFIERS = Study(
    "classifier",
    (
        Variant("convolution", {}),
        Variant(
            "local attention", {"MODEL.SASA.ATTENTION_STAGES": ["res2", "res3", "res4", "res5"]}
        ),
        Variant("pairwise attention", {**_SAN, "MODEL.SAN.ATTENTION": "pairwise"}, _SAN_RATES),
        Variant("patchwise attention", {**_SAN, "MODEL.SAN.ATTENTION": "patchwise"}, _SAN_RATES),
    ),
)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 255:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and up to 255, got {text!r}")
    return value


def probe_robustness_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line that :func:`run_probe_robustness` takes."""
    parser = argparse.ArgumentParser(description=description, epilog=_EPILOG)
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument(
        "--weights",
        nargs="+",
        action="append",
        metavar=("NAME", "FILE"),
        help="name of a kind of classifier and its checkpoints, one for each seed; may be repeated",
    )
    models.add_argument(
        "--train",
        action="store_true",
        help="instead, train classifiers: convolution, local attention, pairwise and patchwise "
        "attention, each with the best of three learning rates; what the output folder holds "
        "already is not run again",
    )
    parser.add_argument(
        "--config-file",
        default="Animals/classifier_conv.yaml",
        metavar="NAME",
        help="with --train: convolutional classifier in the folder of configs, %(default)s by "
        "default; its data set NAME_train has a NAME_tuning_train beside it",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--data", metavar="FOLDER", help="with --weights: image folder, of which val")
    data.add_argument(
        "--dataset",
        metavar="NAME",
        help="with --weights: registered data set, such as digit_crops_val; by default the test "
        "data of the first checkpoint's config",
    )
    parser.add_argument(
        "--every",
        type=positive_int,
        default=1,
        metavar="N",
        help="take every N-th image of the data set, all by default",
    )
    parser.add_argument(
        "--epsilon",
        type=_positive,
        nargs="+",
        default=[Attack.epsilon],
        help="largest changes of a pixel by an attack, of 255; 8 by default",
    )
    parser.add_argument(
        "--step",
        type=_positive,
        help="change of a pixel in a step of the attack; a quarter of epsilon by default",
    )
    parser.add_argument(
        "--steps", type=positive_int, default=Attack.steps, help="of the attack, %(default)s"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=positive_int, default=[1, 2, 3], help="with --train, 1 2 3"
    )
    parser.add_argument(
        "--jobs", type=positive_int, default=available_cores(), help="trainings at the same time"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="with --weights: replace results that exist"
    )
    parser.add_argument(
        "opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, help="config overrides"
    )
    return parser


def run_probe_robustness(args: argparse.Namespace) -> None:
    """Probe classifiers as a command line of :func:`probe_robustness_parser` says.

    Raises:
        UsageError, CheckpointError, DatasetError, FileNotFoundError: in one sentence.
        RuntimeError: if a training fails.
    """
    flush_denormals()
    log_to(None)
    output, attacks = Path(args.output), _attacks(args)
    if args.train:
        if args.data or args.dataset or args.overwrite:
            raise UsageError("--data, --dataset and --overwrite need --weights.")
        files, dataset, notes = _train(output, args.config_file, args.seeds, args.jobs, args.opts)
        probe = _Probe(dataset, args.every, attacks, keep=True)
    else:
        files, notes = _files(args.weights), []
        inputs = [file for group in files.values() for file in group]
        check_output_folder(output, _RESULTS, overwrite=args.overwrite, inputs=inputs)
        dataset = register_image_folder(args.data)[1] if args.data else args.dataset
        probe = _Probe(dataset or "", args.every, attacks, args.opts)
    probe.check(file for group in files.values() for file in group)
    top1: dict[str, dict[str, list[float]]] = {}
    for name, group in files.items():
        for file in group:
            logger.info("Probing %s, %s.", name, file)
            for what, value in probe(file).items():
                top1.setdefault(name, {}).setdefault(what, []).append(value)
    record = {**probe.settings, "weights": {name: list(map(str, files[name])) for name in files}}
    text = "\n\n".join(
        [robustness_report(top1), *notes, f"{probe}; on {describe_machine(default_device())}."]
    )
    with explained(output):
        write_text(output / _NUMBERS, json.dumps({**record, "top1": top1}, indent=2))
        write_text(output / _TABLES, text + "\n")
        draw_robustness(top1, output / _FIGURE, str(probe))
    print(f"\n{text}\n\nPicture: {output / _FIGURE}")


def _attacks(args: argparse.Namespace) -> list[Attack]:
    return [
        Attack(epsilon, args.step or epsilon / 4, args.steps)
        for epsilon in dict.fromkeys(args.epsilon)
    ]


def _files(groups: Sequence[Sequence[str]]) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for name, *group in groups:
        if not group:
            raise UsageError(f"--weights {name} must have checkpoints after the name {name!r}.")
        if name in files:
            raise UsageError(f"--weights has the name {name!r} twice.")
        files[name] = [Path(file) for file in group]
    return files


def _train(
    output: Path, config: str, seeds: Sequence[int], jobs: int, opts: Sequence[str]
) -> tuple[dict[str, list[Path]], str, list[str]]:
    """Train classifiers, or find them.

    Returns:
        Their checkpoints, the data set to test on, and a table of the rates that were tried.
    """
    root = CONFIGS.parent
    if not (root / "tools" / "train_imagenet.py").exists():
        raise UsageError("--train needs a checkout of the project, whose tools it runs.")
    if not (CONFIGS / config).is_file():
        raise UsageError(f"--config-file {config} does not exist in {CONFIGS}.")
    cfg = load_config(str(CONFIGS / config), list(opts))
    check_image_folders((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))  # not in the first training
    experiments = Experiments(root, output, default_device(), jobs)
    found = run_study(CLASSIFIERS, experiments, config, opts, seeds)
    files = {name: list(map(experiments.checkpoint, runs)) for name, runs in found.runs.items()}
    data = cfg.DATASETS.TRAIN[0].removesuffix("_train")
    return files, f"{data}_val", [rates_table(found.tried, "top-1")]


class _Probe:
    """Probes the classifiers of checkpoints, all on the same images.

    Args:
        dataset: registered data set; "" for that of the first classifier's config.
        every: the distance of the images that are taken.
        attacks: on them.
        opts: overrides of the classifiers' configs.
        keep: whether to write what is found beside a checkpoint, and to read it from there.
    """

    def __init__(
        self,
        dataset: str,
        every: int,
        attacks: Sequence[Attack],
        opts: Sequence[str] = (),
        keep: bool = False,
    ):
        self._dataset, self._every, self._attacks = dataset, every, attacks
        self._opts, self._keep = opts, keep

    @property
    def settings(self) -> dict[str, Any]:
        attacks = [asdict(attack) for attack in self._attacks]
        return {"dataset": self._dataset, "every": self._every, "attacks": attacks}

    def __str__(self) -> str:
        images = "all images" if self._every == 1 else f"one in {self._every} images"
        return f"{', '.join(map(str, self._attacks))}; {images} of {self._dataset}"

    def check(self, files: Iterable[Path]) -> None:
        """Find mistakes in all checkpoints and in the data before hours are spent on the first."""
        for file in files:
            if self._kept(file) is None:
                self._load(file)
        check_image_folders([self._dataset])

    def __call__(self, file: Path) -> dict[str, float]:
        """Return top-1 accuracies in percent, by what was done to the images."""
        kept = self._kept(file)
        if kept is not None:
            return kept
        trained = self._load(file)
        task = task_of(trained.options)
        loader = task.test_loader(self._dataset)
        batches = tqdm(loader, desc="Probing", unit="batch")
        found = probe_classifier(
            trained.model,
            every_nth(self._every, batches),
            lambda: task.evaluator(self._dataset, ""),
            self._attacks,
        )
        if self._keep:
            record = {"settings": self.settings, "top1": found}
            write_text(file.with_name(_NUMBERS), json.dumps(record, indent=2))
        return found

    def _kept(self, file: Path) -> dict[str, float] | None:
        record_file = file.with_name(_NUMBERS)
        if not (self._keep and record_file.exists()):
            return None
        record = json.loads(record_file.read_text())
        return record["top1"] if record["settings"] == self.settings else None

    def _load(self, file: Path) -> TrainedModel:
        trained = load_trained_model(file, opts=self._opts, classifiers=True)
        options = trained.options
        if options.meta_architecture != "Classifier":
            raise UsageError(f"{file} is a {options.meta_architecture}, and must be a Classifier.")
        if not self._dataset:
            if not options.test:
                raise UsageError(
                    f"{file}: its config names no data to test on; give --dataset or --data."
                )
            self._dataset = options.test[0]
        classes = num_classes_of([self._dataset])
        if trained.model.num_classes != classes:
            raise UsageError(
                f"{file} tells {trained.model.num_classes} classes apart, and {self._dataset} has "
                f"{classes}."
            )
        return trained


def every_nth(n: int, batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield batches with every ``n``-th of their images, counted over all batches."""
    seen = 0
    for batch in batches:
        number = len(batch["label"])
        kept = range(-seen % n, number, n)
        seen += number
        yield {**batch, "image": batch["image"][kept], "label": batch["label"][kept]}

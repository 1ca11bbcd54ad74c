"""The argument parser, logging, and a run from the command line to its exit status."""

import argparse
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from ..checkpoint import Checkpointer
from ..checkpoint.reading import classes_in
from ..command_line import positive_int
from ..config.changes import log_changes
from ..config.lazy import load_lazy_config
from ..config.load import load_config, register_datasets
from ..config.options import RunOptions
from ..data.catalog import follow_classes
from ..data_arguments import DataParser
from ..errors import USAGE_ERRORS, StopTraining, UsageError, print_error
from ..utils.files import write_text
from ..utils.text import printable
from .checks import check_processes, check_run
from .expected_results import verify
from .launch import first_to_say, is_elastic_restart, launch, started_by_torchrun
from .output_folder import OutputFolder, claim_output
from .train_loop import NonFiniteError
from .trainer import LazyTrainer, Trainer

logger = logging.getLogger(__name__)


class ConfigKind(NamedTuple):
    """What differs between the kinds of configs.

    Attributes:
        load: reads the options of a run from the parsed command line.
        trainer: of the config.
    """

    load: Callable[[argparse.Namespace], RunOptions]
    trainer: type[Trainer]


def _load_yaml(args: argparse.Namespace) -> RunOptions:
    return RunOptions.read(load_config(args.config_file, args.opts, args.train, args.test))


def _load_lazy(args: argparse.Namespace) -> RunOptions:
    return load_lazy_config(args.config_file, args.opts, args.train, args.test)


def _load_classifier(args: argparse.Namespace) -> RunOptions:
    opts = list(args.opts)
    if args.data is not None:
        opts = ["DATASETS.IMAGE_FOLDER", args.data, *opts]
    if args.holdout is not None:
        opts = ["DATASETS.HOLDOUT", str(args.holdout), *opts]
    options = RunOptions.read(load_config(args.config_file, opts))
    if options.meta_architecture != "Classifier":
        raise UsageError(
            f"MODEL.META_ARCHITECTURE must be Classifier here, got {options.meta_architecture} "
            "(sasa-det train trains detectors)."
        )
    return options


YAML = ConfigKind(_load_yaml, Trainer)

LAZY = ConfigKind(_load_lazy, LazyTrainer)

CLASSIFIER = ConfigKind(_load_classifier, Trainer)


def run(
    args: argparse.Namespace, kind: ConfigKind = YAML, *, trainer: type[Trainer] | None = None
) -> int:
    """Train or evaluate as a command line of :func:`argument_parser` says.

    Args:
        args: the parsed command line.
        kind: of the config that it names.
        trainer: a subclass of the kind's trainer, in its place; with several processes it must be
            importable, as from the script that is run.

    Returns:
        int: exit status: 0; 1 if the run failed; 2 if the command line, the config or the data are
        wrong; 143 or 130 if SIGTERM, SIGUSR1 or Ctrl-C stopped the run and everything is saved.
    """
    trainer = trainer or kind.trainer
    flush_denormals()
    log_to(None)
    early = _EarlyWarnings()
    if is_elastic_restart():
        # torchrun repeats the command that it was given.
        args.resume, args.overwrite = "auto", False
    try:
        options = kind.load(args)
        if started_by_torchrun():
            check_processes(options, int(os.environ["LOCAL_WORLD_SIZE"]))
            work = (trainer, options, args, early)
            return launch(_torchrun_worker, 1, device=options.device, args=work)
        check_processes(options, args.num_gpus, args.num_machines, args.dist_url)
        processes = args.num_gpus * args.num_machines
        leader = args.machine_rank == 0
        with _prepared(trainer, options, args, leader, processes, early) as output:
            status = launch(
                _worker,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                device=options.device,
                args=(trainer, options, args.eval_only, output.resumed),
            )
            return _ended(status, output)
    except USAGE_ERRORS as error:
        # Under torchrun all processes read the same config, and find the same mistakes in it.
        return print_error(error) if os.environ.get("LOCAL_RANK", "0") == "0" else 2


@contextmanager
def _prepared(
    trainer: type[Trainer],
    options: RunOptions,
    args: argparse.Namespace,
    leader: bool,
    num_processes: int,
    early: "_EarlyWarnings",
) -> Iterator[OutputFolder]:
    """Claim the output folder of a run in a block and check the run."""
    with claim_output(
        options,
        eval_only=args.eval_only,
        resume=args.resume,
        overwrite=args.overwrite,
        leader=leader,
    ) as output:
        check_run(
            options,
            trainer,
            eval_only=args.eval_only,
            resumed=output.resumed,
            num_processes=num_processes,
        )
        output.clear()
        if leader:
            early.write(Path(options.output_dir, "log.txt"))
        yield output


def _torchrun_worker(
    trainer: type[Trainer],
    options: RunOptions,
    args: argparse.Namespace,
    early: "_EarlyWarnings",
) -> int:
    """Check the run in the first process, and do the work of this one if the check succeeded."""
    with ExitStack() as stack:
        status, resumed, output = 0, False, None
        if comm.is_main_process():
            try:
                prepared = _prepared(trainer, options, args, True, comm.get_world_size(), early)
                output = stack.enter_context(prepared)
                resumed = output.resumed
            except USAGE_ERRORS as error:
                status = print_error(error)
        status, resumed = comm.all_gather((status, resumed))[0]
        if status:
            return status
        return _ended(_worker(trainer, options, args.eval_only, resumed), output)


def _ended(status: int, output: OutputFolder | None) -> int:
    """Clean the output folder after a late usage error, so that the next run is not refused."""
    if status == 2 and output is not None:
        output.discard()
    return status


def _worker(
    trainer_class: type[Trainer], options: RunOptions, eval_only: bool, resume: bool
) -> int:
    """Do the work of one process and return its exit status."""
    flush_denormals()
    register_datasets(options, check=False)
    log_to(options.output_dir, comm.get_rank())
    begin_run(options)
    if comm.is_main_process() and resume and not eval_only:
        log_changes(options)
    try:
        if eval_only:
            work = _evaluation(trainer_class, options, resume)
        else:
            trainer = trainer_class(options.config)
            trainer.resume_or_load(resume=resume)
            work = trainer.train
    except USAGE_ERRORS as error:
        return _print_once(error)
    # The config of a run that is evaluated stays: it is what the run is resumed with. One that is
    # resumed keeps its own until it is known that the checkpoint is of the config's data.
    stored = Path(options.output_dir, "config.yaml")
    if comm.is_main_process() and not (eval_only and stored.exists()):
        write_text(stored, options.dump())
    try:
        work()
    except StopTraining as stop:
        logger.info("Training ends before its last iteration: %s; everything is saved.", stop)
        return stop.status
    except (NonFiniteError, *USAGE_ERRORS) as error:
        _print_once(error)
        return 1
    return 0


def _evaluation(trainer: type[Trainer], options: RunOptions, resume: bool) -> Callable[[], None]:
    """Return what evaluates a model, which is built and filled with the weights to evaluate."""
    model = trainer.build_model(options.config)
    checkpointer = Checkpointer(model, save_dir=options.output_dir, strict=True)
    loaded = checkpointer.resume_or_load(options.weights, resume=resume)
    follow_classes(options.test, classes_in(loaded), "the weights")

    def evaluate() -> None:
        results = dict(trainer.test(options.config, model))
        if options.tta_enabled:
            results.update(trainer.test_with_TTA(options.config, model))
        if options.expected_results:
            verify(options.config, results)

    return evaluate


def _print_once(error: Exception) -> int:
    """Print an error that several processes of the run may have met, and return the status 2."""
    return print_error(error) if first_to_say(str(error)) else 2


def begin_run(options: RunOptions) -> None:
    """Log the environment and the config, and seed the random numbers before the first step."""
    logger.info("Environment:\n%s", collect_env_info())
    logger.info("Config:\n%s", options.dump())
    seed_all_rng(None if options.seed < 0 else options.seed + comm.get_rank())
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    if precision := options.float32_precision:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = precision != "highest"


_LAZY_EPILOG = """
Override values of the config with key=value, for example train.max_iter=1000. A + before the key
adds a key that the config does not have, for example +model.box_reg_loss_type=giou.
"""


def argument_parser(
    kind: ConfigKind = YAML, description: str | None = None
) -> argparse.ArgumentParser:
    """Return detectron2's argument parser with this project's flags.

    Args:
        kind: of the config that ``--config-file`` names.
        description: what the command does.

    Returns:
        argparse.ArgumentParser: beside detectron2's flags, ``--train`` and ``--test`` name data, or
        ``--data`` and ``--holdout`` the images of a classifier, and ``--overwrite`` removes an
        earlier run. ``--resume`` gives "always" and ``--resume auto`` gives "auto"; without it,
        ``resume`` is None.
    """
    base = default_argument_parser()
    parser = _Parser(
        description=description,
        epilog=_LAZY_EPILOG if kind is LAZY else base.epilog,
        formatter_class=base.formatter_class,
        parents=[base],
        add_help=False,
        conflict_handler="resolve",
    )
    parser.add_argument(
        "--num-gpus",
        type=positive_int,
        default=1,
        help="number of processes on this machine; each of them uses one GPU, or the CPU",
    )
    parser.add_argument(
        "--num-machines", type=positive_int, default=1, help="number of machines of the run"
    )
    parser.add_argument(
        "--resume",
        choices=("always", "auto"),
        metavar="[auto]",
        help="continue the run in the output folder, which must contain a checkpoint; with auto, "
        "start a new run if there is no checkpoint, for jobs that are preempted and restarted",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="remove the files of an earlier run from the output folder; without this flag, they "
        "are an error",
    )
    parser.add_argument(
        "--dist-url",
        default="auto",
        help="address at which the processes of several machines connect, for example "
        "tcp://host:port; it is not needed for one machine",
    )
    if kind is CLASSIFIER:
        parser.add_argument(
            "--data",
            type=_folder,
            metavar="FOLDER",
            help="folder with train/ and val/, each with one folder of images for each class, "
            "instead of the config's data",
        )
        parser.add_argument(
            "--holdout",
            type=_share,
            metavar="SHARE",
            help="evaluate on this fraction of the training images of each class, for example "
            "0.04, and train on the rest; the images are always the same",
        )
        return parser
    for split in ("train", "test"):
        parser.add_data_argument(split)
    return parser


def _folder(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must be a folder, got an empty name")
    return text


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and below 1, got {text!r}")
    return share


class _Parser(DataParser):
    """Takes the word after ``--resume`` for its value only if it is ``auto``.

    argparse alone would take the first KEY of the overrides for it.
    """

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        # The words are the command's own if none are given, as argparse has it.
        words = list(sys.argv[1:] if args is None else args)
        for i, word in enumerate(words):
            if word == "--resume":
                auto = words[i + 1 : i + 2] == ["auto"]
                words[i : i + 1 + auto] = ["--resume=auto" if auto else "--resume=always"]
        parsed, rest = super().parse_known_args(words, namespace)
        if not 0 <= parsed.machine_rank < parsed.num_machines:
            self.error(
                f"argument --machine-rank: must be at least 0 and below --num-machines, which is "
                f"{parsed.num_machines}, got {parsed.machine_rank}"
            )
        return parsed, rest


_LOGGERS = ("detectron2", "fvcore", "sasa_det")

# By which detectron2 colours its tables.
_COLOUR = re.compile("\x1b\\[[0-9;]*m")


def log_to(
    folder: str | None, rank: int = 0, shown: Callable[[logging.LogRecord], bool] | None = None
) -> None:
    """Send the log to the terminal and to log.txt in a folder, and nowhere else.

    Args:
        folder: folder of log.txt; None for the terminal alone.
        rank: rank of the process; the terminal shows rank 0.
        shown: returns whether the terminal shows a record; all are shown if None.
    """
    setup_logger.cache_clear()
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        # As default_setup calls it, so that its own call adds nothing.
        named = {} if name == "detectron2" else {"name": name}
        for handler in setup_logger(folder, distributed_rank=rank, **named).handlers:
            handler.addFilter(_escape)
            on_terminal = handler.stream is sys.stdout
            if isinstance(handler.stream, io.TextIOWrapper):
                # Names may have characters that the locale lacks.
                encoding = None if on_terminal else "utf-8"
                handler.stream.reconfigure(encoding=encoding, errors="backslashreplace")
            if shown is not None and on_terminal:
                handler.addFilter(shown)


class _EarlyWarnings(logging.Handler):
    """Keeps the warnings of what comes before a run, until there is its log.txt to have them.

    They are kept until :func:`log_to` is called.
    """

    def __init__(self):
        super().__init__(logging.WARNING)
        self._lines: list[str] = []
        self.addFilter(_escape)
        # As lines of log.txt are.
        form = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
        self.setFormatter(logging.Formatter(form, datefmt="%m/%d %H:%M:%S"))
        for name in _LOGGERS:
            logging.getLogger(name).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))

    def write(self, path: Path) -> None:
        """Write them behind what is in a file."""
        if self._lines:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(f"{line}\n" for line in self._lines)


def _escape(record: logging.LogRecord) -> bool:
    """Escape what names from data hold to steer the terminal that shows the log."""
    record.msg, record.args = _escaped(record.getMessage()), ()
    if record.exc_info:
        record.exc_text = _escaped(logging.Formatter().formatException(record.exc_info))
    return True


def _escaped(text: str) -> str:
    return printable(_COLOUR.sub("", text), keep="\n\t")


def flush_denormals() -> None:
    """Let the processor take numbers below 1e-38 for zero.

    Softmax weights of distant pixels and their gradients become that small in training and would
    slow it down. To be called first in a process: torch's threads inherit the setting when they
    start.
    """
    torch.set_flush_denormal(True)

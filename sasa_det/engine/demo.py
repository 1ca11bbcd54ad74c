"""The demo on handwritten digits: attention, with either stem, and convolution, or a SAN."""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.env import seed_all_rng

from ..analysis.complexity import count_config, total
from ..command_line import refuse_existing
from ..config.load import load_config
from ..config.options import RunOptions
from ..data.mapper import build_test_mapper
from ..evaluation.drawing import draw_curves, draw_detections
from ..utils.files import write_text
from ..utils.machine import default_device, describe_machine
from .checks import check_run
from .comparison import comparison_table
from .defaults import begin_run, flush_denormals, log_to
from .output_folder import claim_output
from .trainer import Trainer

logger = logging.getLogger("sasa_det")

_BACKBONE = "build_retinanet_sasa_resnet_fpn_backbone"
_DETECTORS = {
    "convolution": "retinanet_conv.yaml",
    "attention, convolutional stem": "retinanet_SASA_conv_stem.yaml",
    "attention": "retinanet_SASA.yaml",
}
# On another backbone, in which stem and stages are what they are.
_DETECTORS_ON_OTHERS = {
    "convolutional FPN and heads": "retinanet_conv.yaml",
    "attentional FPN and heads": "retinanet_SASA.yaml",
}


def run_demo(configs: Path, output: Path, opts: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Train detectors with the same budget, from scratch, and compare them.

    One is convolutional, one has attention everywhere but in the stem, and one has it everywhere.
    If ``opts`` names another backbone, there are two on it: FPN and heads of one are convolutional,
    those of the other attentional.

    Args:
        configs: the folder of the configs.
        output: folder to make; it receives results.md, results.json, curves.png and, for each
            model, a folder with the output of training and detections.png.
        opts: config overrides, KEY VALUE pairs. ``MODEL.BACKBONE.NAME
            build_retinanet_san_fpn_backbone`` selects a SAN, which is patchwise with
            ``MODEL.SAN.ATTENTION patchwise``.

    Returns:
        list[dict]: one entry a detector: model, AP, AP50, parameters, flops, seconds (training and
        evaluation) and seconds_per_iteration.

    Raises:
        UsageError: if ``output`` exists and is not an empty folder, or a config is wrong.
    """
    refuse_existing(output, hint=", as in make demo OUTPUT=folder")
    flush_denormals()
    log_to(None)
    device = default_device()

    def config(label: str, file: str) -> CfgNode:
        folder = str(output / label.replace(", ", "_").replace(" ", "_"))
        overrides = ["MODEL.DEVICE", device, *opts, "OUTPUT_DIR", folder]
        options = RunOptions.read(load_config(str(configs / file), overrides))
        check_run(options, Trainer)
        return options.config

    runs = {label: config(label, file) for label, file in _detectors(configs, opts).items()}
    results = [_detector_results(label, cfg) for label, cfg in runs.items()]
    curves = output / "curves.png"
    draw_curves(
        {label: Path(cfg.OUTPUT_DIR, "metrics.json") for label, cfg in runs.items()}, curves
    )
    summary = f"{comparison_table(results)}\n\n{_conditions(next(iter(runs.values())))}\n"
    write_text(output / "results.md", summary)
    write_text(output / "results.json", json.dumps(results, indent=2))
    print(f"\n{summary}")
    pictures = (str(Path(cfg.OUTPUT_DIR, "detections.png")) for cfg in runs.values())
    print(f"Detections: {', '.join(pictures)}")
    print(f"Curves: {curves}")
    return results


def _detectors(configs: Path, opts: Sequence[str]) -> dict[str, str]:
    """Return the configs of the detectors to train, by label."""
    model = load_config(str(configs / _DETECTORS["convolution"]), opts).MODEL
    if model.BACKBONE.NAME == _BACKBONE:
        return _DETECTORS
    name = model.BACKBONE.NAME
    if "_san_" in name:
        name = f"{model.SAN.ATTENTION} SAN{model.SAN.DEPTH}"
    return {f"{name}, {label}": file for label, file in _DETECTORS_ON_OTHERS.items()}


def _train(label: str, cfg: CfgNode) -> tuple[Trainer, float]:
    """Train a model; returns its trainer and the time in seconds."""
    options = RunOptions.read(cfg)
    with claim_output(options):
        log_to(cfg.OUTPUT_DIR, shown=_is_short)
        begin_run(options)
        write_text(Path(cfg.OUTPUT_DIR, "config.yaml"), cfg.dump())
        logger.info("Training the model %s into %s.", label, cfg.OUTPUT_DIR)
        seed_all_rng(max(cfg.SEED, 0))
        start = time.perf_counter()
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        return trainer, time.perf_counter() - start


def _detector_results(label: str, cfg: CfgNode) -> dict[str, Any]:
    trainer, seconds = _train(label, cfg)
    _draw(cfg, trainer.model, Path(cfg.OUTPUT_DIR, "detections.png"))
    box = trainer._last_eval_results["bbox"]
    size = cfg.INPUT.MIN_SIZE_TEST
    parts = total(count_config(cfg, size, size))
    return {
        "model": label,
        "AP": box["AP"],
        "AP50": box["AP50"],
        "parameters": parts.parameters,
        "flops": parts.flops,
        "seconds": seconds,
        "seconds_per_iteration": float(trainer.storage.history("time").median(10**9)),
    }


def _is_short(record: logging.LogRecord) -> bool:
    """Keep long descriptions in the log file and out of the terminal."""
    return not record.getMessage().startswith(("Config:\n", "Environment:\n", "Model:\n"))


def _draw(cfg: CfgNode, model: torch.nn.Module, path: Path, num_images: int = 8) -> None:
    dataset = cfg.DATASETS.TEST[0]
    mapper = build_test_mapper(cfg)
    samples = []
    model.eval()
    for record in DatasetCatalog.get(dataset)[:num_images]:
        with torch.no_grad():
            inputs = mapper(record)
            instances = model([inputs])[0]["instances"].to("cpu")
        image = inputs["image"].numpy().transpose(1, 2, 0)
        samples.append(
            {
                # The mapper's image is in INPUT.FORMAT and of the size of the file.
                "image": image if cfg.INPUT.FORMAT == "RGB" else image[:, :, ::-1],
                "gt_boxes": [
                    BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
                    for a in record["annotations"]
                ],
                "gt_classes": [a["category_id"] for a in record["annotations"]],
                "boxes": instances.pred_boxes.tensor.numpy(),
                "scores": instances.scores.numpy(),
                "classes": instances.pred_classes.numpy(),
            }
        )
    draw_detections(samples, path, MetadataCatalog.get(dataset).thing_classes, columns=2)


def _conditions(cfg: CfgNode) -> str:
    return (
        f"{cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} images, from scratch; "
        f"COCO AP on {', '.join(cfg.DATASETS.TEST)}; FLOPs of one {cfg.INPUT.MIN_SIZE_TEST} x "
        f"{cfg.INPUT.MIN_SIZE_TEST} image, a multiply-add being 2; seconds of training and "
        f"evaluation on {describe_machine(cfg.MODEL.DEVICE)}."
    )

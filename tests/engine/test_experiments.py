"""Trainings that are compared: run once, gone on with, and read again."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from sasa_det.analysis.san_paper import SAN_RELATIONS
from sasa_det.benchmark.measure import Settings
from sasa_det.benchmark.models import CASES
from sasa_det.config.load import load_config
from sasa_det.engine import ablations, evidence, measured_steps
from sasa_det.engine.experiments import Experiment, Experiments, overrides
from sasa_det.engine.measured_steps import measure_steps
from sasa_det.errors import UsageError
from sasa_det.layers import PairwiseAttention2d, PatchwiseAttention2d

ROOT = Path(__file__).parents[2]
TINY = overrides(
    {
        "SOLVER.MAX_ITER": 4,
        "TEST.EVAL_PERIOD": 4,
        "TEST.EVAL_EPOCHS": 0.0,
        "SOLVER.MAX_EPOCHS": 0.0,
        "SOLVER.WARMUP_EPOCHS": 0.0,
        "SEED": 1,
        "MODEL.PIXEL_STD": (58.0, 57.0, 57.0),
    }
)


@pytest.fixture
def tiny(tmp_path):
    """Return a function that describes a training on a few images of noise."""
    generator = np.random.default_rng(0)
    for split, name, number in product(("train", "val"), ("a", "b"), range(4)):
        file = tmp_path / "images" / split / name / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(file)
    data = ("DATASETS.IMAGE_FOLDER", str(tmp_path / "images"))

    def describe(name, *more, **options):
        config = "Quick/classifier_SASA.yaml"
        overrides = (*TINY, *data, *more)
        options["metric"] = "classification/top1"
        return Experiment(name, "train_imagenet", config, overrides, **options)

    return describe


def experiments(output):
    return Experiments(ROOT, output, "cpu")


@pytest.mark.slow
def test_experiments_run_once_and_start_from_each_other(tmp_path, tiny, digits):
    first = tiny("first")
    (outcome,) = experiments(tmp_path).run([first]).values()
    assert [iteration for iteration, _ in outcome.curve] == [4]
    assert outcome.final["classification/top1"] == outcome.curve[-1][1]
    assert outcome.loss > 0
    log = tmp_path / "logs" / "first.txt"
    written = log.stat().st_mtime_ns
    # An interrupted one without a checkpoint begins again; one that has ended stays as it is.
    (tmp_path / "runs" / "second").mkdir()
    still = {"SOLVER.BASE_LR": 1e-12, "TEST.EVAL_PERIOD": 4, "SEED": 1}
    for split, folder in (("TRAIN", "train"), ("TEST", "val")):
        still[f"DATASETS.{split}_JSON"] = f"{digits / folder}.json"
        still[f"DATASETS.{split}_IMAGES"] = str(digits / folder)
    second = Experiment(
        "second", "train_net", "Quick/retinanet_SASA.yaml", overrides(still), after="first"
    )
    results = experiments(tmp_path).run([first, second])
    assert list(results) == ["first", "second"]
    assert results["first"] == outcome
    assert log.stat().st_mtime_ns == written
    assert "first/backbone.pth" in (tmp_path / "logs" / "second.txt").read_text()
    # The detector's backbone is that of the classifier: at this rate it stays as it started.
    source, started = (
        torch.load(tmp_path / "runs" / name / "model_final.pth", weights_only=False)["model"]
        for name in ("first", "second")
    )
    state = ("running_mean", "running_var", "num_batches_tracked", "linear.weight", "linear.bias")
    learned = [name for name in source if not name.endswith(state)]
    assert len(learned) > 50
    for name in learned:
        torch.testing.assert_close(started[f"backbone.bottom_up.{name}"], source[name])
    with pytest.raises(UsageError, match="first holds an experiment with other settings"):
        experiments(tmp_path).run([tiny("first", "SOLVER.BASE_LR", "0.1")])


def test_a_refused_experiment_is_named_with_the_reason(tmp_path, tiny):
    wrong = tiny("wrong", "SOLVER.OPTIMIZER", "AdamX")
    with pytest.raises(UsageError, match=r"experiment wrong: SOLVER.OPTIMIZER must be .*AdamX"):
        experiments(tmp_path).run([wrong])
    assert not (tmp_path / "runs" / "wrong" / "experiment.json").exists()


@pytest.mark.parametrize("name", ablations.FINDINGS)
def test_rows_change_what_the_papers_models_change(name):
    table = ablations.TABLES[name]
    rows = {row.name for row in table.rows}
    assert {f.better for f in ablations.FINDINGS[name]} <= rows
    assert {f.worse for f in ablations.FINDINGS[name]} <= rows
    small = ablations._default_config(name)
    for row in table.rows:
        experiment = ablations._experiment(ROOT, table, row, 3, small, ())
        cfg = load_config(str(ROOT / "configs" / small), list(experiment.overrides))
        large = load_config(str(ROOT / "configs" / table.folder / f"{row.config}.yaml"))
        for key in ("STEM_VALUES", "ATTENTION_STAGES", "POSITION", "CONTENT"):
            assert cfg.MODEL.SASA[key] == large.MODEL.SASA[key], (row.name, key)
        assert cfg.SEED == 3
        assert cfg.MODEL.BACKBONE.NAME == large.MODEL.BACKBONE.NAME
        for key in ("ATTENTION", "RELATION", "DEPTH"):
            assert cfg.MODEL.SAN[key] == large.MODEL.SAN[key], (row.name, key)
        if name == "Table 4":
            assert cfg.MODEL.SASA.KERNEL_SIZE == large.MODEL.SASA.KERNEL_SIZE
        if name == "Table 7":
            assert cfg.MODEL.SASA.STEM == large.MODEL.SASA.STEM == "attention"


def test_san_relations_are_all_that_there_are():
    small, found = "Digits/classifier_SAN_pairwise.yaml", []
    for row in SAN_RELATIONS.rows:
        experiment = ablations._experiment(ROOT, SAN_RELATIONS, row, 1, small, ())
        words = [*experiment.overrides, "MODEL.DEVICE", "meta"]
        with torch.device("meta"):
            model = build_model(load_config(str(ROOT / "configs" / small), words))
        layers = [
            m for m in model.modules() if isinstance(m, (PairwiseAttention2d, PatchwiseAttention2d))
        ]
        ((kind, relation),) = {(layer.kind, layer.relation) for layer in layers}
        assert row.name == f"{kind}, {relation.replace('hadamard', 'Hadamard').replace('_', ' ')}"
        assert len(layers) == 10
        found.append((kind, relation))
    assert found == [
        *(("pairwise", relation) for relation in PairwiseAttention2d.relations),
        *(("patchwise", relation) for relation in PatchwiseAttention2d.relations),
    ]


def test_a_table_needs_the_backbone_whose_keys_it_changes(tmp_path, tiny):
    data = tiny("any").overrides[-2:]
    for tables, config, told in (
        (["san_relations"], "Quick/classifier_SASA.yaml", "build_san_backbone, and Quick/"),
        (["5"], "Digits/classifier_SAN_pairwise.yaml", "build_sasa_resnet_backbone, and Digits/"),
    ):
        with pytest.raises(UsageError, match=f"--tables {tables[0]} needs .* {told}"):
            ablations.run_ablations(ROOT, tmp_path / "output", tables, config, data, [1], 1)
    assert not (tmp_path / "output").exists()


def test_report_of_san_relations():
    results = {row.name: [60.0 + i, 62.0 + i] for i, row in enumerate(SAN_RELATIONS.rows)}
    report = ablations._report("san_relations", SAN_RELATIONS, results)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines()]
    assert ["pairwise, subtraction", "74.9", "61.0", "1.4"] in cells
    assert ["pairwise, summation", "", "62.0", "1.4"] in cells
    better = "The paper's patchwise model is better than its pairwise model."
    assert [better, "holds (+5.0 ± 1.4)"] in cells
    worse = "Subtraction, as in the paper's pairwise models, is better than dot product."
    assert [worse, "the opposite holds (-4.0 ± 1.4)"] in cells
    assert len(ablations.FINDINGS["san_relations"]) == 7


@pytest.mark.parametrize(
    ("better", "worse", "said"),
    [
        ([71.0, 72.0, 73.0], [60.0, 61.0, 62.0], "holds (+11.0 ± 0.8)"),
        ([60.0, 61.0, 62.0], [71.0, 72.0, 73.0], "the opposite holds (-11.0 ± 0.8)"),
        ([70.0, 71.0, 72.0], [69.0, 70.0, 71.0], "not decided (+1.0 ± 0.8)"),
        ([70.0], [60.0], "not decided by one seed (+10.0)"),
    ],
)
def test_a_finding_holds_beyond_twice_the_standard_error(better, worse, said):
    assert ablations.verdict(better, worse) == said


def test_rates_are_chosen_on_training_digits_and_seeds_share_them(tmp_path):
    """The plan, with outcomes that a record in each folder gives."""
    best = {"conv": "0.003", "SASA": "0.006", "SASA_conv_stem": "0.012"}
    asked = []

    class Recorded(Experiments):
        def _write_backbone(self, name):
            assert (self._folder(name) / "experiment.json").exists()

        def _train(self, experiment):
            asked.append(experiment)
            kind = next(
                k for k in sorted(best, key=len, reverse=True) if f"-{k}-" in experiment.name
            )
            settings = dict(zip(experiment.overrides[::2], experiment.overrides[1::2], strict=True))
            value = 70.0 if settings["SOLVER.BASE_LR"] == best[kind] else 60.0
            value += float(settings["SEED"])
            final = {"bbox/AP": value, "bbox/AP50": value + 20}
            record = {"settings": self._settings(experiment), "curve": [[4, value]]}
            folder = self._folder(experiment.name)
            folder.mkdir(parents=True)
            (folder / "experiment.json").write_text(
                json.dumps({**record, "final": final, "loss": 1.0})
            )

    study = evidence._Study(Recorded(ROOT, tmp_path, "cpu"), evidence.Budget())
    tried = study.choose_rates()
    assert all("_tuning_train" in " ".join(e.overrides) for e in asked)
    assert not any("digits_val" in " ".join(e.overrides) for e in asked)
    assert tried["attention, pretrained"][0.006] == 71.0
    asked.clear()
    finals = study.compare()
    assert len(finals) == 3 * 2 * 3
    detectors = [e for e in asked if e.tool == "train_net"]
    assert {e.overrides[1] for e in detectors if "-conv-" in e.name} == {"0.003"}
    # Each seed has a backbone of its own, of the same model.
    for experiment in detectors:
        if experiment.after:
            kind, seed = experiment.config[len("Digits/retinanet_") : -5], experiment.name[-1]
            (backbone,) = [e for e in asked if e.name == experiment.after]
            assert backbone.config == f"Digits/classifier_{kind}.yaml"
            assert "('digit_crops_train',)" in backbone.overrides
            assert backbone.overrides[-2:] == experiment.overrides[-2:] == ("SEED", seed)
    steps = {model: (0.1, 50.0) for model in evidence.MODELS}
    rows = list(evidence._rows(ROOT, finals, steps))
    assert rows[0]["AP"] == "72.0 ± 1.0"
    assert rows[0]["training step (ms)"] == "100" and rows[0]["its memory (MiB)"] == "50"
    assert rows[1]["AP minus twin's"] == "+0.0 ± 0.0"
    asked.clear()
    variants = study.compare_variants()
    assert len(asked) == len(variants) == 3 * 3
    for experiment in asked:
        cfg = load_config(str(ROOT / "configs" / experiment.config), list(experiment.overrides))
        # The model that they are compared with, with the rate that was best for them.
        assert cfg.MODEL.SASA.STEM == "convolution" and cfg.MODEL.SASA.HEAD == "attention"
        assert cfg.SOLVER.BASE_LR == 0.012 and not experiment.after
        assert cfg.MODEL.SASA.CONTENT == ("without-q.k" not in experiment.name)
        assert (cfg.MODEL.SASA.POSITION == "none") == ("without-q.r" in experiment.name)
        assert (cfg.MODEL.SASA.QK_NORM == "BN") == ("batch-norm" in experiment.name)
    kept, *others = evidence._variant_rows(finals, variants)
    assert kept["AP"] == "72.0 ± 1.0" and kept["minus the first row"] == ""
    assert [each["minus the first row"] for each in others] == ["+0.0 ± 0.0"] * 3


def test_steps_are_those_of_the_models_as_they_are_trained(tmp_path):
    """Read from results that the benchmark has written; the names are checked against its cases."""
    settings = Settings("cpu", torch.float32, 1, 128, ROOT / "configs")
    (case,) = [each for each in CASES["digits"](settings) if "training" in each.name]
    names = [contender.name for contender in case.contenders]
    results = [
        {"case": case.name, "contender": name, "seconds": number, "memory": 2**20 * number}
        for number, name in enumerate(names, 1)
    ]
    (tmp_path / "results.json").write_text(json.dumps({"results": results}))
    steps = measure_steps(ROOT, tmp_path, "cpu")
    assert list(steps) == list(evidence.MODELS)
    expected = [names.index(name) + 1 for name in measured_steps._ROWS.values()]
    assert list(steps.values()) == [(number, number) for number in expected]
    (tmp_path / "results.json").write_text(json.dumps({"results": results[:-1]}))
    with pytest.raises(UsageError, match=f"no time and memory of '{names[-1]}'"):
        measure_steps(ROOT, tmp_path, "cpu")

"""Studies of this project's own keys: what they plan, choose and report."""

import json
from pathlib import Path

import pytest

from sasa_det.config.load import load_config
from sasa_det.engine import ablations, studies
from sasa_det.engine.experiments import Experiments
from sasa_det.errors import UsageError

ROOT = Path(__file__).parents[2]
CONFIG = "Digits/classifier_SASA_conv_stem.yaml"


class Recorded(Experiments):
    """Experiments whose outcomes follow from their settings."""

    def __init__(self, output, value):
        super().__init__(ROOT, output, "cpu")
        self.asked, self._value = [], value

    def _settings(self, experiment):
        return {"overrides": list(experiment.overrides)}  # reading configs takes seconds

    def _train(self, experiment):
        self.asked.append(experiment)
        settings = dict(zip(experiment.overrides[::2], experiment.overrides[1::2], strict=True))
        record = {
            "settings": self._settings(experiment),
            "curve": [[4, self._value(settings)]],
            "final": {},
            "loss": 1.0,
        }
        folder = self._folder(experiment.name)
        folder.mkdir(parents=True)
        (folder / "experiment.json").write_text(json.dumps(record))


def value(settings):
    """AdamW is best at its lowest rate and NAG at its highest; seeds add 1 each."""
    rate = float(settings["SOLVER.BASE_LR"])
    best = 90.0 - 100 * rate if settings["SOLVER.OPTIMIZER"] == "AdamW" else 80.0 + 10 * rate
    return best + float(settings["SEED"])


def test_rates_are_chosen_on_training_digits_and_seeds_share_them(tmp_path):
    study, runs = studies.STUDIES["optimizers"], Recorded(tmp_path, value)
    results = studies.run_study(study, runs, CONFIG, ("SOLVER.MAX_ITER", "7"), [1, 2, 3])
    tuned = [e for e in runs.asked if "('digit_crops_tuning_train',)" in e.overrides]
    assert len(tuned) == 4 * 3
    assert all("('digit_crops_tuning_val',)" in e.overrides for e in tuned)
    compared = [e for e in runs.asked if "('digit_crops_val',)" in e.overrides]
    assert len(compared) == 4 * 3 == len(runs.asked) - len(tuned)
    assert all(e.overrides[:2] == ("SOLVER.MAX_ITER", "7") for e in runs.asked)
    assert {e.name.split("-digit_crops")[0]: e.overrides[e.overrides.index("SOLVER.BASE_LR") + 1]
            for e in compared} == {
        "AdamW-a-twentieth-of-the-rate": "0.004", "AdamW-full-rate": "0.004",
        "NAG-full-rate": "0.1", "NAG-a-twentieth-of-the-rate": "0.1",
    }  # fmt: skip
    assert results.tried["NAG, full rate"] == {0.01: 81.1, 0.03: 81.3, 0.1: 82.0}
    assert results.top1["NAG, full rate"] == [82.0, 83.0, 84.0]
    report = studies.study_report(study, results)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines()]
    assert ["NAG, full rate", "83.0", "82.0, 83.0, 84.0", "1.0", "-8.6 ± 0.8"] in cells
    assert ["AdamW, full rate", "91.6", "90.6, 91.6, 92.6", "1.0", "+0.0 ± 0.8"] in cells
    assert ["NAG, full rate", "0.01: 81.1, 0.03: 81.3, 0.1: 82.0", "0.1"] in cells
    # Rows that both studies have are trained once.
    runs.asked.clear()
    studies.run_study(studies.STUDIES["logits"], runs, CONFIG, ("SOLVER.MAX_ITER", "7"), [1, 2, 3])
    assert len(runs.asked) == 7 * 6
    assert not any(e.name.startswith("AdamW") for e in runs.asked)


@pytest.mark.parametrize("name", studies.STUDIES)
def test_variants_are_configs_of_the_classifier(name):
    variants = studies.STUDIES[name].variants
    found = {}
    for variant in variants:
        planned = studies._experiment(variant, "digit_crops", 0.01, 2, CONFIG, ())
        cfg = load_config(str(ROOT / "configs" / CONFIG), list(planned.overrides))
        solver, sasa = cfg.SOLVER, cfg.MODEL.SASA
        assert (solver.BASE_LR, cfg.SEED) == (0.01, 2)
        found[variant.name] = (
            solver.OPTIMIZER, solver.NESTEROV, solver.LOGIT_LR_FACTOR, solver.LINEAR_LR_FACTOR,
            solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_LOGIT, solver.LOGIT_WARMUP_ITERS,
            sasa.QK_NORM, sasa.SCALE_LOGITS, sasa.CONTENT,
        )  # fmt: skip
        # The linear layer is not what is studied.
        if solver.OPTIMIZER == "AdamW":
            assert solver.LINEAR_LR_FACTOR == 0.05 and solver.WEIGHT_DECAY == 0.01
        else:
            assert solver.NESTEROV and solver.MOMENTUM == 0.9 and solver.LINEAR_LR_FACTOR == 1
    assert len(set(found.values())) == len(variants) == len(found)


def test_the_names_of_all_tables_are_known(tmp_path):
    with pytest.raises(
        UsageError, match="'logit' must be of 3, 4, 5, 6, 7, san_relations, logits, opt"
    ):
        ablations.run_ablations(ROOT, tmp_path, ["logit"], CONFIG, (), [1], 1)

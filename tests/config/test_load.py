"""Reading configs: keys, types, and which file or override wins."""

import pytest
import yaml

from sasa_det.config.load import load_config
from sasa_det.errors import UsageError

CONFIG = "configs/Quick/retinanet_SASA.yaml"


def refused(*args):
    """Load a config that must be refused and return the sentence that says why."""
    with pytest.raises(UsageError) as error:
        load_config(*args)
    message = str(error.value)
    assert "\n" not in message
    return message


OVERRIDES = {
    "unknown key": (
        ["MODEL.SASA.KERNEL_SISE", "7"],
        "config key MODEL.SASA.KERNEL_SISE does not exist; did you mean MODEL.SASA.KERNEL_SIZE?",
    ),
    "unknown section": (["SLOVER.MAX_ITER", "7"], "did you mean SOLVER.MAX_ITER?"),
    "nothing alike": (["XYZZY", "7"], "config key XYZZY does not exist."),
    "key of a key": (["SEED.X", "3"], "config key SEED.X does not exist"),
    "base": (["_BASE_", "some.yaml"], "config key _BASE_ does not exist"),
    "internals": (["__immutable__", "True"], "config key __immutable__ does not exist"),
    "string for integer": (
        ["MODEL.SASA.KERNEL_SIZE", "seven"],
        "MODEL.SASA.KERNEL_SIZE must be an integer, got 'seven'.",
    ),
    "not a number": (["SOLVER.BASE_LR", "nan"], "SOLVER.BASE_LR must be a number, got 'nan'."),
    "value for section": (["MODEL.SASA", "3"], "MODEL.SASA must be a section of keys, got '3'."),
    "section for value": (["SEED", "{'A': 1}"], "SEED must be an integer, got \"{'A': 1}\"."),
    "not a pair": (["MODEL.SASA.KERNEL_SIZE"], "must be KEY VALUE pairs, got 'MODEL.SASA.KERNEL"),
    "flag": (["SEED", "3", "--resume"], "flags come before the KEY VALUE pairs, got --resume"),
    "flag with a value": (["--train=a", "b"], "flags come before the KEY VALUE pairs, got --train"),
    "call": (["SEED", "__import__('os').getpid()"], "SEED must be an integer, got"),
    "deep": (["SEED", "-" * 100_000 + "1"], ""),
}


def test_integers_for_floats(tmp_path):
    """Whoever writes 50 epochs does not think of a decimal point."""
    path = tmp_path / "config.yaml"
    path.write_text("SOLVER:\n  MAX_EPOCHS: 50\n  AMP: {ENABLED: true}\n  BASE_LR: 1\n")
    cfg = load_config(str(path), ["MODEL.EMA.DECAY", "0", "SOLVER.WARMUP_EPOCHS", "2"])
    found = cfg.SOLVER.MAX_EPOCHS, cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_EPOCHS
    assert found == (50.0, 1.0, 2.0) and {type(value) for value in found} == {float}
    assert cfg.SOLVER.AMP.ENABLED is True and cfg.MODEL.EMA.DECAY == 0


@pytest.mark.parametrize("case", OVERRIDES)
def test_overrides(case):
    opts, message = OVERRIDES[case]
    assert message in refused(CONFIG, opts)


FILES = {
    "unknown key": (
        "MODEL: {SASA: {KERNEL_SISE: 7}}",
        "config key MODEL.SASA.KERNEL_SISE does not exist; did you mean MODEL.SASA.KERNEL_SIZE?",
    ),
    "unknown section": ("SLOVER: {MAX_ITER: 7}", "config key SLOVER does not exist; did you mean"),
    "dots": (
        "MODEL.SASA.KERNEL_SIZE: 7",
        "config key MODEL.SASA.KERNEL_SIZE must be written as a key in a section, not with dots.",
    ),
    "string for integer": ("SEED: seven", "SEED must be an integer, got 'seven'."),
    "value for section": ("MODEL: 3", "MODEL must be a section of keys, got 3."),
    "nothing for section": ("MODEL:", "MODEL must be a section of keys, got None."),
    "section for value": ("SEED: {A: 1}", "SEED must be an integer, got a section of keys."),
    "inner base": ("MODEL: {_BASE_: a.yaml}", "config key MODEL._BASE_ does not exist"),
}


@pytest.mark.parametrize("case", FILES)
def test_files(case, tmp_path):
    """A mistake is told with the file that holds it, be that a base of a base."""
    content, message = FILES[case]
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    assert refused(str(path)).startswith(f"{path}: {message}")
    (tmp_path / "middle.yaml").write_text("_BASE_: wrong.yaml")
    (tmp_path / "top.yaml").write_text("_BASE_: middle.yaml\nSEED: 3")
    text = refused(str(tmp_path / "top.yaml"))
    assert text.startswith(f"{path}: {message}")


def test_later_files_and_overrides_win(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "SEED: 1\nVIS_PERIOD: 1\nSOLVER: {MAX_ITER: 5, STEPS: [1, 2]}"
    )
    (tmp_path / "top.yaml").write_text("_BASE_: base.yaml\nVIS_PERIOD: 2\nSOLVER: {MAX_ITER: 6}")
    cfg = load_config(str(tmp_path / "top.yaml"), ["SOLVER.MAX_ITER", "7"])
    assert (cfg.SEED, cfg.VIS_PERIOD, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (1, 2, 7, (1, 2))
    assert cfg.is_frozen()


def test_a_config_that_was_written_is_read_as_it_was(tmp_path):
    cfg = load_config(CONFIG)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = load_config(str(tmp_path / "config.yaml"))
    # Without its aliases, and without the tuples in lists, which yaml makes lists.
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_data_is_named_once(split):
    sources = {split.lower(): ("a.json", "images")}
    for key in (f"DATASETS.{split}", f"DATASETS.{split}_JSON"):
        opts = [key, "('digits',)" if key.endswith(split) else "b.json"]
        with pytest.raises(UsageError) as error:
            load_config(CONFIG, opts, **sources)
        assert str(error.value) == f"--{split.lower()} and {key} both name data; leave one out."

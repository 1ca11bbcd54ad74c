"""``sasa-det`` and the scripts in tools/, which are the same commands."""

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import sasa_det_cli
from sasa_det.engine.train import train_parser
from sasa_det_cli import COMMANDS, main

# What the project itself is developed with; and train_net.py, which users copy and change.
OF_DEVELOPERS = {"ablate", "digits_demo", "evidence", "install_detectron2", "measure_onnx", "trees"}
TOOLS = {path.stem for path in Path(__file__).parents[1].glob("tools/*.py")}
TOOLS -= OF_DEVELOPERS | {"train_net"}


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/sasa-det", *words])
    with pytest.raises(SystemExit) as end:
        sys.exit(main())
    return end.value.code


def test_tools_and_commands_are_the_same(monkeypatch):
    names = []
    monkeypatch.setattr(sasa_det_cli, "run", names.append)
    for tool in TOOLS:
        with pytest.raises(SystemExit):
            runpy.run_path(f"tools/{tool}.py", run_name="__main__")
    # tools/train_net.py trains, and evaluates with --eval-only.
    assert sorted([*names, "train", "eval"]) == sorted(COMMANDS)


def test_train_net_and_train_take_the_same_words(monkeypatch):
    words = ["--config-file", "a.yaml", "--num-gpus", "2", "--resume", "SEED", "1"]
    seen = []
    monkeypatch.setattr("sasa_det.engine.run", lambda args, **_: seen.append(vars(args)))
    monkeypatch.setattr(sys, "argv", ["tools/train_net.py", *words])
    with pytest.raises(SystemExit):
        runpy.run_path("tools/train_net.py", run_name="__main__")
    assert seen == [vars(train_parser().parse_args(words))]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(name, monkeypatch, capsys):
    assert call(monkeypatch, name, "--help") == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: sasa-det {name} ")
    assert COMMANDS[name][1] in " ".join(told.split())
    assert "/somewhere/bin" not in told
    module = importlib.import_module(COMMANDS[name][0])
    assert callable(getattr(module, f"run_{name.replace('-', '_')}"))


def test_help_lists_the_commands_without_importing_anything(tmp_path):
    code = "import sys, sasa_det_cli\ntry:\n    sasa_det_cli.main()\nfinally:\n    "
    code += "print('imported', {'torch', 'numpy', 'detectron2', 'sasa_det'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
    )
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert all(f"{name} {summary}" in lines for name, (_, summary) in COMMANDS.items())
    assert lines[-1] == "imported set()"


@pytest.mark.parametrize(
    "words,told",
    [
        (["trian"], "the command 'trian' does not exist; did you mean train?"),
        (["xyz"], "the command 'xyz' does not exist; there are train, "),
        ([], "the following arguments are required: COMMAND"),
        (["--weights", "a.pth"], "required: COMMAND"),
    ],
)
def test_a_wrong_command(words, told, monkeypatch, capsys):
    assert call(monkeypatch, *words) == 2
    assert told in capsys.readouterr().err


def test_in_another_locale_it_starts_again_before_it_imports_anything():
    code = """
import importlib, sys, sasa_det_cli
importlib.import_module = lambda name: sys.exit(f"{name} in UTF-8 mode: {sys.flags.utf8_mode}")
sasa_det_cli.run("predict")
"""
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stderr == "sasa_det.engine.predict in UTF-8 mode: 1\n"


def test_without_detectron2_a_command_says_what_to_install():
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "detectron2" else find(name, *a)
import sasa_det_cli
sys.exit(sasa_det_cli.run("predict"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: sasa_det needs detectron2, which is not installed: run ")
    assert "Traceback" not in done.stderr

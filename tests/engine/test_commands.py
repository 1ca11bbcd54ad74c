"""The commands as processes, and the package where detectron2 is missing."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from sasa_det.checkpoint import read_checkpoint
from sasa_det.command_line import run_command
from sasa_det.data import write_digits
from sasa_det.engine import UsageError, argument_parser, run
from sasa_det.engine.demo import run_demo
from sasa_det.errors import StopTraining
from sasa_det.ops import cpu


def call(*words, **kwargs):
    command = [sys.executable, *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def call_all(*calls):
    """Call commands, each a tuple of words, side by side."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda words: call(*words), calls))


HIDDEN = (
    "import sys; sys.modules['detectron2'] = None; import importlib.util as u; f = u.find_spec; "
)
HIDDEN += "u.find_spec = lambda name, *a: None if name == 'detectron2' else f(name, *a); "


def test_operators_and_layers_work_without_detectron2():
    works = (
        "from sasa_det import ops, layers; import sasa_det.layers.position; "
        "from sasa_det.layers import AttentionStem; from sasa_det.ops import cpu; "
        "print('works', cpu.MISSING)"
    )
    result = call("-c", HIDDEN + works)
    assert result.stdout == f"works {cpu.MISSING}\n", result.stderr


def test_the_rest_says_what_to_do_without_detectron2():
    statements = (
        "from sasa_det import add_sasa_config",
        "import sasa_det; sasa_det.add_sasa_config",
        "import sasa_det.engine",
        "from sasa_det import modeling",
    )
    results = call_all(*(("-c", HIDDEN + statement) for statement in statements))
    for statement, result in zip(statements, results, strict=True):
        assert result.returncode == 1, statement
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("ImportError: sasa_det needs detectron2, which is not installed:")


def test_analyze_model(monkeypatch, capsys):
    def status(*words):
        monkeypatch.setattr(sys, "argv", ["tools/analyze_model.py", "--config-file", *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_path("tools/analyze_model.py", run_name="__main__")
        return end.value.code

    assert status("configs/Quick/retinanet_SASA.yaml", "--size", "64", "96") == 0
    printed = capsys.readouterr().out
    assert "One image of 64 x 96" in printed and "| head " in printed
    assert status("nowhere.yaml") == 2
    error = capsys.readouterr().err
    assert error.strip().splitlines()[-1].startswith("error: config file nowhere.yaml")


def test_a_hostile_config_executes_nothing(start, tmp_path):
    marker, base = tmp_path / "executed", tmp_path / "base.yaml"
    base.write_text(f"SEED: !!python/object/apply:os.system ['touch {marker}']")
    (tmp_path / "config.yaml").write_text("_BASE_: base.yaml")
    process = start(data=["--config-file", tmp_path / "config.yaml"])
    output = process.communicate()[0]
    assert process.returncode == 2
    assert "Traceback" not in output
    last = output.strip().splitlines()[-1]
    assert last.startswith(
        f"error: {base}, line 1: a value of type !!python/object/apply:os.system"
    )
    assert not marker.exists()


def test_how_commands_end(capsys):
    def ending(error):
        def main():
            raise error

        return run_command(main), capsys.readouterr().err

    assert run_command(lambda: None) == 0 and run_command(lambda: 1) == 1
    assert ending(KeyboardInterrupt()) == (130, "")
    status, told = ending(StopTraining("SIGTERM was received", 143))
    assert status == 143 and "SIGTERM was received" in told
    assert ending(UsageError("SEED must be an integer.")) == (
        2,
        "error: SEED must be an integer.\n",
    )
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


# Those that import neither PyTorch nor detectron2 start at once.
OTHERS = {Path("tools/install_detectron2.py"), Path("tools/measure_onnx.py")}
TOOLS = set(Path("tools").glob("*.py")) - OTHERS


def imports(tool):
    return [line for line in tool.read_text().splitlines() if line.startswith(("import", "from"))]


# Those that do nothing but call sasa_det_cli.
ALIKE = {tool for tool in TOOLS if imports(tool) == ["import sys", "from sasa_det_cli import run"]}


@pytest.mark.slow
def test_ctrl_c_while_a_command_is_imported(start, read_until):
    assert len(TOOLS) == 21 and len(ALIKE) == 16
    for tool in [*sorted(TOOLS - ALIKE), min(ALIKE)]:
        process = start(launcher=("-X", "importtime"), tool=tool, data=["--help"])
        output = read_until(process, "numpy")
        process.send_signal(signal.SIGINT)
        output += process.communicate()[0]
        assert process.returncode == 130 and "Traceback" not in output, output[-2000:]


@pytest.mark.slow
def test_ctrl_c_in_the_demo(start, read_until, demo_opts, tmp_path):
    words = ["--output", tmp_path / "demo", *demo_opts, "SOLVER.MAX_ITER", "1000"]
    process = start(tool="tools/digits_demo.py", data=words)
    output = read_until(process, "Starting training")
    process.send_signal(signal.SIGINT)
    output += process.communicate()[0]
    assert process.returncode == 130 and "Traceback" not in output, output[-2000:]
    assert "The command ends: SIGINT was received" in output
    # The step that ran is saved, and nothing of the comparison is there.
    folder = tmp_path / "demo" / "convolution"
    assert read_checkpoint(folder / (folder / "last_checkpoint").read_text())["iteration"] >= 0
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["convolution"]


@pytest.mark.slow
def test_names_outside_ascii_in_any_locale(digits, tmp_path):
    """In files, in the log and on a terminal that has no characters for them."""
    content = json.loads((digits / "val.json").read_text())
    names = [f"größe {category['id']}" for category in content["categories"]]
    for category, name in zip(content["categories"], names, strict=True):
        category["name"] = name
    shutil.copytree(digits / "val", tmp_path / "bilder")
    image = content["images"][0]
    (tmp_path / "bilder" / image["file_name"]).rename(tmp_path / "bilder" / "größe.png")
    image["file_name"] = "größe.png"
    json_file = tmp_path / "größe.json"
    json_file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    data, folder = [json_file, tmp_path / "bilder"], tmp_path / "läufe"
    arguments = ["--train", *data, "--test", *data, "SOLVER.MAX_ITER", 2, "OUTPUT_DIR", folder]
    arguments += [
        "MODEL.RETINANET.SCORE_THRESH_TEST",
        0.0,
        "TEST.BEST_METRIC",
        f"bbox/AP-{names[0]}",
    ]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    result = call(
        *("tools/train_net.py", "--config-file", "configs/Quick/retinanet_SASA.yaml", *arguments),
        env={**os.environ, **locale},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for text in (result.stdout, result.stderr):
        assert "Traceback" not in text and "Logging error" not in text and text.isascii()
    assert r"gr\xf6\xdfe 1" in result.stdout
    assert all(name in (folder / "log.txt").read_text(encoding="utf-8") for name in names)
    (last,) = (folder / "metrics.json").read_text(encoding="utf-8").splitlines()[-1:]
    assert f"bbox/AP-{names[0]}" in json.loads(last)
    stored = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert stored["DATASETS"]["TEST_JSON"] == str(json_file)
    assert read_checkpoint(folder / "model_final.pth")["trainer"]["classes"] == names


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(start, read_until, tmp_path, capsys):
    """The second is refused while the first lives, and goes on where that was killed."""
    digits = write_digits(tmp_path / "digits", num_train=4, num_val=2, image_size=64)
    words = ["--config-file", "configs/Quick/retinanet_SASA.yaml"]
    for split, name in (("train", "train"), ("test", "val")):
        words += [f"--{split}", digits / f"{name}.json", digits / name]
    folder = tmp_path / "run"
    output = ["OUTPUT_DIR", folder, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_CHECKPOINTS", 2]
    endless = [*output, "SOLVER.MAX_ITER", 10**6]

    def in_this_process(*flags, end=4):
        command = [*words, *flags, *output, "SOLVER.MAX_ITER", end]
        status = run(argument_parser().parse_args([str(word) for word in command]))
        printed = capsys.readouterr()
        return status, printed.out, printed.err.strip().splitlines()[-1:]

    first = start(*endless, data=words)
    for _ in range(2):  # when the second is begun, the first is there
        read_until(first, "Saving checkpoint")
    refusal = f"error: OUTPUT_DIR {folder} is in use by another run (process {first.pid} on"
    for flags in ([], ["--overwrite"], ["--resume"], ["--resume", "auto"]):
        status, _, (error,) = in_this_process(*flags)
        assert status == 2 and error.startswith(refusal)
    assert first.poll() is None
    first.kill()
    first.wait()
    last = int(Path((folder / "last_checkpoint").read_text()).stem.removeprefix("model_"))
    status, printed, _ = in_this_process("--resume", "auto", end=last + 3)
    assert status == 0
    assert f"Starting training from iteration {last + 1}" in printed
    assert "SOLVER.MAX_ITER, from 1000000 to " in printed


@pytest.fixture
def demo_opts(tmp_path):
    """Overrides of the demo: a few iterations on a few small images."""
    digits = write_digits(tmp_path / "digits", num_train=4, num_val=4, image_size=64)
    opts = []
    for split, name in (("TRAIN", "train"), ("TEST", "val")):
        opts += [f"DATASETS.{split}_JSON", str(digits / f"{name}.json")]
        opts += [f"DATASETS.{split}_IMAGES", str(digits / name)]
    opts += ["SOLVER.MAX_ITER", "6", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "2"]
    opts += ["TEST.EVAL_PERIOD", "3", "INPUT.JITTER.CROP_SIZE", "64", "DATALOADER.NUM_WORKERS", "0"]
    return [*opts, "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "64"]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["patchwise"])
def test_demo_on_a_san(tmp_path, demo_opts, attention):
    """One KEY VALUE selects the backbone, another one the other kind of it."""
    opts = [*demo_opts, "MODEL.BACKBONE.NAME", "build_retinanet_san_fpn_backbone"]
    opts += ["MODEL.SAN.ATTENTION", attention] if attention == "patchwise" else []
    output = tmp_path / "demo"
    results = run_demo(Path("configs/Digits"), output, opts)
    name = f"{attention} SAN10"
    models = [f"{name}, convolutional FPN and heads", f"{name}, attentional FPN and heads"]
    assert [result["model"] for result in results] == models
    convolutional, attentional = results
    assert attentional["parameters"] < 0.8 * convolutional["parameters"]
    kind = f"{attention.capitalize()}Attention2d"
    for model, attends in zip(models, (False, True), strict=True):
        folder = output / model.replace(", ", "_").replace(" ", "_")
        log = (folder / "log.txt").read_text()
        assert kind in log and ("AttentionRetinaNetHead" in log) == attends
        assert (folder / "detections.png").stat().st_size > 0
        losses = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
        assert all(loss["total_loss"] < 10 for loss in losses if "total_loss" in loss)
    assert f"| {models[1]} " in (output / "results.md").read_text()


@pytest.mark.slow
def test_demo_compares_and_draws(tmp_path, capsys, demo_opts):
    opts = demo_opts
    output = tmp_path / "demo"
    results = run_demo(Path("configs/Digits"), output, opts)
    models = ["convolution", "attention, convolutional stem", "attention"]
    assert [result["model"] for result in results] == models
    twin, conv_stem, attention = results
    for result in (conv_stem, attention):
        assert result["parameters"] < 0.66 * twin["parameters"]
        assert result["flops"] < 0.62 * twin["flops"]
    written = json.loads((output / "results.json").read_text())
    assert str(written) == str(results)  # as text: AP is NaN where nothing was found
    for name in (
        "results.md",
        "curves.png",
        "attention/detections.png",
        "attention_convolutional_stem/detections.png",
        "convolution/metrics.json",
    ):
        assert (output / name).stat().st_size > 0, name
    # Each model's log is its own.
    assert "AttentionStem" not in (output / "convolution" / "log.txt").read_text()
    assert "the model convolution" not in (output / "attention" / "log.txt").read_text()
    printed = capsys.readouterr().out
    assert (output / "results.md").read_text() in printed
    with pytest.raises(UsageError, match="output .* exists already; name another one"):
        run_demo(Path("configs/Digits"), output, opts)

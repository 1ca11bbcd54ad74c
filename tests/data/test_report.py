"""What a person reads about a data set, in the log and from the command."""

import os
import signal
import subprocess
import sys

import pytest

from sasa_det.data import validate_coco
from sasa_det.data.validation_report import describe_report, summarize_warnings
from sasa_det.engine.validate_data import run_validate_data, validate_data_parser


def test_report_names_files_classes_and_problems(write, content):
    content["annotations"][0]["iscrowd"] = "0"
    del content["annotations"][0]["area"]
    json_file, root = write(content)
    report = validate_coco(json_file, root)
    text = describe_report(report)
    assert text.startswith(f"{json_file} with images in {root}, for training or evaluation\n")
    assert text.count(" with images in ") == 1
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["5", "ant", "1"] in cells and ["9", "cup", "0"] in cells
    assert ["error", "iscrowd other than 0 and 1", "1", "refused"] in cells
    row = ["warning", "annotations without area or iscrowd", "1", "refused in evaluation"]
    assert row in cells
    assert "error: iscrowd other than 0 and 1 (1)\n  annotations[0] (id 11 of image 7)" in text
    assert "detectron2 numbers the classes 0 to 1." in text
    assert text.endswith("1 error, 2 warnings: these data are refused.")
    assert "without area" not in describe_report(report.for_use(True))
    assert ["error", *row[1:3], "refused"] in [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in describe_report(report.for_use(False)).splitlines()
    ]


def test_long_lists_are_cut_unless_everything_is_asked_for(write, content):
    content["categories"] = [{"id": i, "name": f"class{i}"} for i in range(1, 101)]
    first = content["annotations"][0]
    content["annotations"] = [{**first, "id": i, "category_id": 77} for i in range(1, 4)]
    arguments = write(content)
    short = describe_report(validate_coco(*arguments, limit=5))
    assert "the 40 most frequent of 100" in short and "class77" in short and "class50" not in short
    assert "  ... and 94 more, which --all lists" in short
    full = describe_report(validate_coco(*arguments), everything=True)
    assert all(f"class{i} " in full for i in range(1, 101)) and "more, which" not in full


def test_names_cannot_steer_the_terminal(write, content):
    content["categories"][0]["name"] = "\x1b[2Jcup\n"
    content["images"][1]["file_name"] = "\x1b[2J.png"
    text = describe_report(validate_coco(*write(content)))
    assert "\\x1b[2Jcup\\n" in text and "\\x1b[2J.png" in text
    assert all(line.isprintable() for line in text.splitlines())


def test_warnings_are_a_sentence_each(write, content):
    content["annotations"][0]["bbox"] = [4, 1, 10, 1]
    json_file, root = write(content)
    assert summarize_warnings(validate_coco(json_file, root)) == [
        f"{json_file}: boxes partly outside of their image: 1 (annotation 11); training cuts them "
        "off",
        f"{json_file}: classes without boxes: 1 (category 9 ('cup') has no boxes); they cannot be "
        "learned",
    ]


@pytest.mark.slow
def test_command(write, content, tmp_path, capsys):
    content["categories"][0]["name"] = "café"
    good, root = write(content, "good.json")
    content["annotations"][0]["iscrowd"] = 5
    (root / "sub" / "b.png").write_bytes(b"")
    bad, _ = write(content, "bad.json")
    # Names may hold what the terminal has no characters for.
    command = [sys.executable, "tools/validate_data.py", good, root, "--test"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    good = done.stdout
    assert "| caf\\xe9 " in good and "for evaluation\n" in good
    assert "0 errors, 1 warning: these data " in good
    assert good.endswith(
        "can be used for evaluation; whether the images can be read is checked with --pixels.\n"
    )

    def in_this_process(*words):
        before = signal.getsignal(signal.SIGPIPE)
        try:
            status = run_validate_data(validate_data_parser().parse_args(map(str, words)))
        finally:
            signal.signal(signal.SIGPIPE, before)
        return status, *capsys.readouterr()

    status, bad, _ = in_this_process(bad, root, "--train", "--pixels", "--all")
    assert status == 1
    assert "bad.json with images in" in bad and "for training\n" in bad
    assert "iscrowd other than 0 and 1 (1)" in bad and "b.png is empty" in bad
    assert bad.endswith("2 errors, 1 warning: these data are refused.\n")
    status, missing, errors = in_this_process(tmp_path / "none.json", root)
    assert status == 2 and missing == ""
    assert errors == f"error: json file {tmp_path / 'none.json'} does not exist\n"

"""Config files: nothing executes, nothing is fetched, and every mistake names the file."""

import os
import re
from contextlib import suppress

import pytest
import yaml

from sasa_det.config.yaml_file import read_config_file
from sasa_det.errors import UsageError


def refused(path):
    """Read a file that must be refused and return the sentence that says why."""
    with pytest.raises(UsageError) as error:
        read_config_file(str(path))
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


@pytest.fixture
def write(tmp_path):
    def write_file(content, name="config.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


TAG = "!!python/object/apply:os.system"
HOSTILE = {
    "apply": f"SEED: {TAG} DO",
    "new": "SEED: !!python/object/new:os.system DO",
    "in a list": f"MODEL: {{PIXEL_MEAN: [1, {TAG} DO]}}",
    "as a key": f"? {TAG} DO\n: 3",
    "behind an anchor": f"A: &a {TAG} DO\nB: *a",
    "as a base": f"_BASE_: {TAG} DO",
    "by its long name": "SEED: !<tag:yaml.org,2002:python/object/apply:os.system> DO",
    "by a directive": "%TAG ! tag:yaml.org,2002:python/\n---\nSEED: !object/apply:os.system DO",
}


def hostile_text(case, marker):
    """A config that makes the file ``marker`` where its tags are obeyed."""
    return HOSTILE[case].replace("DO", f"['touch {marker}']")


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("nested", [False, True])
def test_python_tags_do_not_execute(case, nested, write, tmp_path):
    marker = tmp_path / "executed"
    hostile = write(hostile_text(case, marker), "hostile.yaml")
    path = hostile
    if nested:
        middle = write("_BASE_: hostile.yaml\nSEED: 1", "middle.yaml")
        path = write(f"_BASE_: [{middle}]\nSEED: 1", "sub/top.yaml")
    message = refused(path)
    assert not marker.exists()
    assert re.match(rf"{hostile}(, line \d+)?: ", message)


def test_the_tags_would_execute(tmp_path):
    """What the test above rests on: a loader that allows them runs them."""
    executed = set()
    for number, case in enumerate(HOSTILE):
        marker = tmp_path / str(number)
        with suppress(yaml.YAMLError, TypeError):
            yaml.unsafe_load(hostile_text(case, marker))
        if marker.exists():
            executed.add(case)
    assert executed == HOSTILE.keys()


@pytest.mark.parametrize(
    "tag", ["!!python/tuple [1]", "!!python/name:os.system ''", "!!python/module:os ''", "!mine 3"]
)
def test_other_tags_are_refused_by_name_and_line(tag, write):
    path = write(f"VERSION: 2\nMODEL:\n  WEIGHTS: {tag}")
    message = refused(path)
    assert message.startswith(f"{path}, line 3: a value of type {tag.split()[0]} is not allowed")


@pytest.mark.parametrize(
    ("value", "kind"), [("2026-11-21", "!!timestamp"), ("!!binary aGk=", "!!binary")]
)
def test_values_that_are_not_plain(value, kind, write):
    path = write(f"OUTPUT_DIR: {value}")
    assert f"{path}, line 1: a value of type {kind} is not allowed" in refused(path)


def test_bases_come_first(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write("SEED: 1\nMODEL: {DEVICE: a}", "home/far.yaml")
    write("_BASE_: ~/far.yaml\nSEED: 2", "base/near.yaml")
    write("SEED: 3", "base/other.yaml")
    path = write("_BASE_: [base/near.yaml, base/other.yaml]\nVIS_PERIOD: 4", "top.yaml")
    files = read_config_file(str(path))
    assert [os.path.basename(name) for name, _ in files] == [
        "far.yaml", "near.yaml", "other.yaml", "top.yaml",
    ]  # fmt: skip
    assert [values for _, values in files] == [
        {"SEED": 1, "MODEL": {"DEVICE": "a"}}, {"SEED": 2}, {"SEED": 3}, {"VIS_PERIOD": 4},
    ]  # fmt: skip


def test_a_file_that_is_its_own_base(write):
    alone = write("_BASE_: alone.yaml", "alone.yaml")
    assert refused(alone) == f"{alone}: _BASE_ alone.yaml makes a file a base of itself."
    write("_BASE_: ../b.yaml", "sub/a.yaml")
    second = write("_BASE_: sub/a.yaml", "b.yaml")
    assert "sub/a.yaml: _BASE_ ../b.yaml makes a file a base of itself." in refused(second)
    link = alone.with_name("link.yaml")
    link.symlink_to(write("_BASE_: link.yaml", "linked.yaml"))
    assert "makes a file a base of itself" in refused(link)


def test_more_bases_than_any_config_has(write):
    for number in range(40):
        write(f"_BASE_: [{number + 1}.yaml, {number + 1}.yaml]", f"{number}.yaml")
    last = write("SEED: 1", "40.yaml")
    assert "is more than the 64th file" in refused(last.with_name("0.yaml"))


@pytest.mark.parametrize(
    "base",
    [
        "https://example.invalid/base.yaml",
        "http://example.invalid/base.yaml",
        "s3://bucket/base.yaml",
        "file:///etc/hostname",
        "detectron2://COCO-Detection/retinanet_R_50_FPN_1x/190397773/config.yaml",
    ],
)
def test_remote_configs_are_refused(base, write):
    path = write(f"_BASE_: {base}")
    assert refused(path) == f"{path}: _BASE_ {base} is a URL; configs are read from the disk alone."
    assert refused(base) == f"config file {base} is a URL; configs are read from the disk alone."


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nowhere.yaml", "_BASE_ nowhere.yaml does not exist."),
        (".", "_BASE_ . is not a file."),
        ('"a\\0b"', "does not exist."),
        ('""', "_BASE_ must be a path or a list of paths, got ''."),
        ("3", "_BASE_ must be a path or a list of paths, got 3."),
        ("null", "_BASE_ must be a path or a list of paths, got None."),
        ("[other.yaml, {}]", "_BASE_ must be a path or a list of paths"),
    ],
)
def test_bases_that_are_no_files(base, message, write):
    write("SEED: 1", "other.yaml")
    path = write(f"_BASE_: {base}")
    assert message in refused(path) and str(path) in refused(path)


BROKEN = {
    "list": (b"- 1\n- 2", " must hold a mapping of keys to values, holds sequence."),
    "scalar": (b"just words", " must hold a mapping of keys to values, holds scalar."),
    "empty": (b"", " must hold a mapping of keys to values, holds nothing."),
    "comment": (b"# nothing else", " must hold a mapping of keys to values, holds nothing."),
    "binary": (bytes(range(256)), " is not text in UTF-8."),
    "UTF-16": ("SEED: 1".encode("utf-16"), " is not text in UTF-8."),
    "control character": (b"SEED: \x07", " is not valid yaml: unacceptable character #x0007"),
    "unclosed": (b"SEED: [1, 2", ", line 1: expected ',' or ']', but got '<stream end>'."),
    "two documents": (b"SEED: 1\n---\nSEED: 2", ", line 2: but found another document."),
    "tab": (b"MODEL:\n\tDEVICE: cpu", ", line 2: found character '\\t' that cannot start"),
    "tag that does not fit": (b"SEED: !!int word", " is not valid yaml: invalid literal for int()"),
    "truth that does not fit": (b"SEED: !!bool word", " is not valid yaml: 'word'."),
    "unknown anchor": (b"SEED: *a", ", line 1: found undefined alias 'a'."),
    "number as key": (b"MODEL: {}\n3: 4", ", line 2: a key must be a string, got '3'."),
    "truth as key": (b"on: 4", ", line 1: a key must be a string, got 'on'."),
    "list as key": (b"? [a]\n: 4", ", line 1: a key must be a string, got a sequence."),
    "key twice": (
        b"SEED: 1\nMODEL:\n  DEVICE: a\nSEED: 2",
        ", line 4: key SEED is there already, on line 1.",
    ),
    "inner key twice": (
        b"MODEL:\n  DEVICE: a\n  'DEVICE': b",
        ", line 3: key DEVICE is there already, on line 2.",
    ),
    "large": (
        b"# " + b"x" * 1_000_000,
        " is too large for a config: it has more than 1000000 bytes.",
    ),
    "deep": (b"SEED: " + b"[" * 1000, " is nested too deeply."),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_hold_no_config(case, write):
    content, message = BROKEN[case]
    path = write(content)
    assert message in refused(path)
    top = write("_BASE_: config.yaml", "top.yaml")
    assert message in refused(top) and str(path) in refused(top)


def test_aliases_must_not_explode(write):
    lines = ["a: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"k{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]" for n in range(1, 20)]
    assert "holds more than 100000 values where its aliases" in refused(write("\n".join(lines)))
    lines = ["a: &x0 {b: 1}"]
    lines += [f"k{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 10)}]}}" for n in range(1, 20)]
    assert "holds more than 100000 values where its aliases" in refused(write("\n".join(lines)))
    assert "holds more than 100000 values" in refused(write("a: &a [*a]"))


def test_a_few_aliases_are_fine(write):
    path = write("A: &a {X: 1, Y: 2}\nB: {<<: *a, Y: 3}\nC: *a")
    assert read_config_file(str(path))[0][1] == {
        "A": {"X": 1, "Y": 2}, "B": {"X": 1, "Y": 3}, "C": {"X": 1, "Y": 2},
    }  # fmt: skip


def test_files_that_cannot_be_opened(tmp_path):
    assert refused(tmp_path / "nowhere.yaml").endswith("nowhere.yaml does not exist.")
    assert refused(tmp_path) == f"config file {tmp_path} is not a file."
    # Would block a reader, or feed it for ever.
    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path / "pipe").endswith("is not a file.")
    assert refused("/dev/zero") == "config file /dev/zero is not a file."


def test_a_lazy_config_is_named_as_such(write):
    path = write("model = dict()\n", "lazy.py")
    assert refused(path).startswith(f"config file {path} is not yaml: LazyConfigs are for")

"""Words that name data: one or two, and never a KEY of the overrides behind them."""

import argparse

import pytest

from sasa_det.data_arguments import DataParser, data_format


@pytest.fixture
def parser():
    parser = DataParser()
    for split in ("train", "test"):
        parser.add_data_argument(split)
    parser.add_argument("--output")
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    return parser


@pytest.mark.parametrize(
    ("words", "train", "test", "opts"),
    [
        ("--train a.json images", ["a.json", "images"], None, []),
        ("--train a.json IMAGES KEY 1", ["a.json", "IMAGES"], None, ["KEY", "1"]),
        ("--train d.yaml", ["d.yaml"], None, []),
        ("--train d.yaml MODEL.DEVICE cpu", ["d.yaml"], None, ["MODEL.DEVICE", "cpu"]),
        ("--train d.yaml OUTPUT_DIR out", ["d.yaml"], None, ["OUTPUT_DIR", "out"]),
        ("--train d.yaml train.max_iter=2", ["d.yaml"], None, ["train.max_iter=2"]),
        ("--train d.yaml --test d.yaml test", ["d.yaml"], ["d.yaml", "test"], []),
        ("--test voc --output x SEED 1", None, ["voc"], ["SEED", "1"]),
        ("--train voc trainval SEED 1", ["voc", "trainval"], None, ["SEED", "1"]),
        ("--train voc --test voc val", ["voc"], ["voc", "val"], []),
        ("--train=d.yaml SEED 1", ["d.yaml"], None, ["SEED", "1"]),
        ("--output --train", None, None, None),
    ],
)
def test_words(parser, words, train, test, opts):
    if opts is None:
        with pytest.raises(SystemExit):
            parser.parse_args(words.split())
        return
    args = parser.parse_args(words.split())
    assert (args.train, args.test) == (train, test)
    assert [word for word in args.opts if word != "--"] == opts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--train", "argument --train: expected at least one argument"),
        ("--train a.json", "argument --train: expected the image folder of a.json behind it"),
        (
            "--train a.json SOLVER.MAX_ITER 2",
            "argument --train: expected the image folder of a.json behind it",
        ),
    ],
)
def test_words_that_name_no_data(parser, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(words.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_command_without_overrides_takes_no_third_word(capsys):
    parser = DataParser()
    parser.add_data_argument("test", required=True)
    assert parser.parse_args(["--test", "d.yaml"]).test == ["d.yaml"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--test", "a.json", "images", "more"])
    assert "expected data and their image folder or split, got 3 words" in capsys.readouterr().err


def test_formats(tmp_path):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "json").write_text("")
    names = ["d.yaml", "d.YML", "a.json", "s3://x/a", str(tmp_path / "json"), "none"]
    assert [data_format(name) for name in names] == ["yolo", "yolo", *["coco"] * 3, "voc"]
    assert data_format(str(tmp_path / "folder.json")) == "voc"

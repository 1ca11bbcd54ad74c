"""The command line: --resume with and without a word, and numbers that make no sense."""

import pytest

from sasa_det.engine import argument_parser

OVERRIDES = ["SOLVER.MAX_ITER", "6"]


@pytest.mark.parametrize(
    ("words", "resume", "opts"),
    [
        ([], None, []),
        (OVERRIDES, None, OVERRIDES),
        (["--resume"], "always", []),
        (["--resume", *OVERRIDES], "always", OVERRIDES),
        (["--resume", "--num-gpus", "2", *OVERRIDES], "always", OVERRIDES),
        (["--num-gpus", "2", "--resume"], "always", []),
        (["--resume", "auto"], "auto", []),
        (["--resume", "auto", *OVERRIDES], "auto", OVERRIDES),
        (["--resume", "auto", "--num-gpus", "2", *OVERRIDES], "auto", OVERRIDES),
        (["--resume=auto", *OVERRIDES], "auto", OVERRIDES),
        # Only right after the flag is the word its own.
        (["--resume", "OUTPUT_DIR", "auto"], "always", ["OUTPUT_DIR", "auto"]),
    ],
)
def test_resume_takes_the_word_auto_and_no_key(words, resume, opts):
    args = argument_parser().parse_args(["--config-file", "some.yaml", *words])
    assert args.resume == resume
    assert args.opts == opts
    assert args.config_file == "some.yaml"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume=maybe"], "argument --resume: invalid choice: 'maybe'"),
        (["--num-gpus", "0"], "argument --num-gpus: must be an integer of at least 1, got '0'"),
        (["--num-gpus", "two"], "argument --num-gpus: must be an integer of at least 1, got 'two'"),
        (["--num-machines", "-1"], "argument --num-machines: must be an integer of at least 1"),
        (["--machine-rank", "1"], "argument --machine-rank: must be at least 0 and below"),
        (["--machine-rank", "-1"], "argument --machine-rank: must be at least 0 and below"),
        (
            ["--train", "only.json"],
            "argument --train: expected the image folder of only.json behind it",
        ),
    ],
)
def test_arguments_that_make_no_sense(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        argument_parser().parse_args(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_says_what_the_flags_are(capsys):
    with pytest.raises(SystemExit) as stop:
        argument_parser().parse_args(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--config-file", "--resume [auto]", "--overwrite", "--train", "--eval-only"):
        assert flag in text

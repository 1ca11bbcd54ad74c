"""Names from data reach neither the terminal nor log.txt with what steers a terminal."""

import logging

import pytest

from sasa_det.engine.defaults import log_to
from sasa_det.errors import UsageError, print_error

HOSTILE = "cup\x1b[2J\x1b]0;title\x07\x9b31m\u202e\r\nerror: forged"
SHOWN = "cup\\x1b[2J\\x1b]0;title\\x07\\x9b31m\\u202e\\r"
STEERING = ("\x1b[2J", "\x1b]", "\x1b[36m", "\x07", "\x9b", "\u202e", "\r")


@pytest.fixture
def logged(tmp_path, capsys):
    """Return a function that gives what a function logs, in log.txt and on the terminal."""

    def call(function):
        log_to(str(tmp_path))
        function()
        for name in ("sasa_det", "detectron2"):
            for handler in logging.getLogger(name).handlers:
                handler.flush()
        log_to(None)
        return (tmp_path / "log.txt").read_bytes().decode(), capsys.readouterr().out

    return call


def test_messages_and_tables_are_escaped(logged):
    def write():
        logging.getLogger("sasa_det.data").warning("Class %s has no boxes.", HOSTILE)
        # As detectron2 colours its tables.
        table = f"\x1b[36m| {HOSTILE} |\n| second row |\x1b[0m"
        logging.getLogger("detectron2.data").info(table)

    for text in logged(write):
        assert f"Class {SHOWN}\nerror: forged has no boxes." in text
        assert f"| {SHOWN}\nerror: forged |\n| second row |" in text
        assert not any(mark in text for mark in STEERING)


def test_a_traceback_is_escaped(logged):
    def write():
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            logging.getLogger("sasa_det").exception("It failed.")

    for text in logged(write):
        assert f"ValueError: {SHOWN}\nerror: forged" in text
        assert not any(mark in text for mark in STEERING)


def test_an_error_is_one_line_whatever_it_names(capsys):
    assert print_error(UsageError(f"class {HOSTILE} is unknown")) == 2
    assert capsys.readouterr().err == f"error: class {SHOWN}\\nerror: forged is unknown\n"

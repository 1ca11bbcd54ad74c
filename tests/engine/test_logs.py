"""Names from data reach neither the terminal nor log.txt with what steers a terminal."""

import logging

import pytest

from sasa_det.engine.defaults import _EarlyWarnings, log_to
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


def test_warnings_before_a_run_are_in_its_log(tmp_path):
    log_to(None)
    early = _EarlyWarnings()
    logger = logging.getLogger("sasa_det.data")
    logger.warning("Class %s has no boxes.", HOSTILE)
    logger.info("A file is read.")
    path = tmp_path / "log.txt"
    path.write_text("of an earlier run\n")
    early.write(path)
    log_to(str(tmp_path))
    logger.info("The run begins.")
    log_to(None)
    text = path.read_text()
    assert text.startswith("of an earlier run\n[")
    assert f"] sasa_det.data WARNING: Class {SHOWN}\nerror: forged has no boxes.\n" in text
    assert "A file is read." not in text and "The run begins." in text
    assert text.count("has no boxes") == 1


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

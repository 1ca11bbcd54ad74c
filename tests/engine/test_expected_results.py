"""The last line of a log says that results are not those that were expected."""

import pytest

from sasa_det.config.load import load_config
from sasa_det.engine.expected_results import verify


@pytest.mark.parametrize("found", [3.0, 5.0, float("nan")])
def test_the_last_line_says_what_is_wrong(caplog, found):
    config = load_config(opts=["TEST.EXPECTED_RESULTS", "[['bbox','AP',3.0,1.0]]"])
    if found == 3:
        verify(config, {"bbox": {"AP": found}})
        return
    with pytest.raises(SystemExit) as stop:
        verify(config, {"bbox": {"AP": found}})
    assert stop.value.code == 1
    assert caplog.messages[-1] == "The results are not those that TEST.EXPECTED_RESULTS names."

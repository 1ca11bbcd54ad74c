"""What setup.py asks for."""

import re
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def test_versions_of_pycocotools_that_need_info_in_a_json_are_excluded():
    text = re.search(r'"(pycocotools[^"]*)"', (ROOT / "setup.py").read_text())[1]
    pinned = re.search(r"^pycocotools==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)[1]
    allowed = Requirement(text).specifier
    assert not {"2.0.9", "2.0.10"} & set(allowed.filter(["2.0.8", "2.0.9", "2.0.10", "2.0.11"]))
    assert pinned in allowed

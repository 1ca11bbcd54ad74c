"""The page of config keys has those of the config."""

import inspect
import sys
from pathlib import Path

from detectron2.config import get_cfg

from sasa_det.config import add_sasa_config, defaults
from sasa_det.config.keys import flatten

EXTENSIONS = Path(__file__).parents[2] / "docs" / "extensions"


def test_every_key_that_is_added_is_described(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXTENSIONS), *sys.path])
    from key_comments import read_keys

    cfg = get_cfg()
    before = set(flatten(cfg))
    add_sasa_config(cfg)
    comments = read_keys(inspect.getsource(defaults))
    assert set(comments) == set(flatten(cfg)) - before
    assert len(comments) > 60
    for key, comment in comments.items():
        assert comment.endswith(".") and len(comment.split()) > 3, key
    assert comments["MODEL.SASA.STEM_HEADS"] == "Number of attention heads of the stem."
    assert comments["MODEL.BN_DECAY"].startswith("Decay of the running statistics of batch norms")

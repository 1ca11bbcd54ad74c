"""The directive ``config-keys``: every config key of sasa_det, from sasa_det/config/defaults.py."""

import inspect
from collections.abc import Iterator
from functools import reduce

from docutils import nodes
from docutils.parsers.rst import Directive
from key_comments import read_keys

from sasa_det.config import defaults


class ConfigKeys(Directive):
    """A list of all keys with their defaults and what they mean."""

    def run(self) -> list[nodes.Node]:
        cfg = defaults.default_config()
        comments = read_keys(inspect.getsource(defaults))
        settings = self.state.document.settings
        settings.record_dependencies.add(defaults.__file__)
        items = nodes.definition_list()
        for key, comment in comments.items():
            default = reduce(lambda node, name: node[name], key.split("."), cfg)
            items += _item(key, repr(default), comment)
        return [items]


def _item(key: str, default: str, comment: str) -> nodes.definition_list_item:
    term = nodes.term("", "", *_term(key, default), ids=[key.lower().replace(".", "-")])
    return nodes.definition_list_item(
        "", term, nodes.definition("", nodes.paragraph(comment, comment))
    )


def _term(key: str, default: str) -> Iterator[nodes.Node]:
    yield nodes.literal(key, key)
    yield nodes.Text(" = ")
    yield nodes.literal(default, default)


def setup(app) -> dict[str, bool]:
    app.add_directive("config-keys", ConfigKeys)
    return {"parallel_read_safe": True}

"""The role ``:paper:`` of detectron2's docstrings: a link to a paper by its short name."""

from docutils import nodes

_PAPERS = {
    "FPN": "https://arxiv.org/abs/1612.03144",
    "ResNet": "https://arxiv.org/abs/1512.03385",
    "RetinaNet": "https://arxiv.org/abs/1708.02002",
}


def _paper(name, rawtext, text, lineno, inliner, options=None, content=None):
    if text not in _PAPERS:
        message = inliner.reporter.error(f"the paper {text} is not in {__file__}", line=lineno)
        return [inliner.problematic(rawtext, rawtext, message)], [message]
    return [nodes.reference(rawtext, text, refuri=_PAPERS[text])], []


def setup(app) -> dict[str, bool]:
    app.add_role("paper", _paper)
    return {"parallel_read_safe": True}

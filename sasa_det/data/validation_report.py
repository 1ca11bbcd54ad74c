"""A report on a data set as text."""

from tabulate import tabulate

from ..utils.text import printable
from .coco_entries import NOT_COCO

__all__ = ["describe_report", "summarize_warnings"]


_CLASSES_SHOWN = 40

_COLUMNS = 3

_IDS_SHOWN = 5

_PIPES = {"tablefmt": "github", "disable_numparse": True}


def describe_report(report, *, everything=False):
    """Describe a report: what the data hold, the classes, and the problems by kind.

    Args:
        report (CocoReport): what to describe, with all problems that shall be listed.
        everything (bool): list all classes, not only the most frequent ones.

    Returns:
        str: lines for a terminal.
    """
    use = {True: "training", False: "evaluation", None: "training or evaluation"}[report.training]
    files = f"{printable(report.json_file)} with images in {printable(report.image_root)}"
    parts = [f"{files}, for {use}"]
    if NOT_COCO not in report.counts:
        parts += [_contents(report), _classes(report, everything), _id_note(report)]
    parts += [_overview(report), _details(report), _verdict(report)]
    return "\n\n".join(filter(None, parts))


def summarize_warnings(report):
    """Return a sentence for each kind of warning, with its count and the first ids."""
    sentences = []
    for kind in report.kinds("warning"):
        shown = ", ".join(map(_identity, report.examples(kind)[:_IDS_SHOWN]))
        more = ", ..." if report.counts[kind] > _IDS_SHOWN else ""
        sentences.append(
            f"{report.json_file}: {kind.title}: {_count(report, kind)} ({shown}{more}); "
            f"{kind.effect}"
        )
    return sentences


def _identity(problem):
    if problem.annotation_id is not None:
        return f"annotation {problem.annotation_id}"
    return f"image {problem.image_id}" if problem.image_id is not None else problem.message


def _count(report, kind):
    count = report.counts[kind]
    if not kind.has_share:
        return f"{count:,}"
    return f"{count:,} of {report.num_annotations:,}, {count / report.num_annotations:.1%}"


def _contents(report):
    rows = [
        ["images", f"{report.num_images:,}"],
        ["images without annotations", f"{report.num_unannotated:,}"],
        ["annotations", f"{report.num_annotations:,}"],
        ["crowds among them", f"{report.num_crowds:,}"],
        ["classes", f"{len(report.categories):,}"],
    ]
    return tabulate(rows, tablefmt="plain", colalign=("left", "right"))


def _classes(report, everything):
    categories = list(report.categories)
    if not categories:
        return ""
    title = "Boxes by class, without crowds"
    if len(categories) > _CLASSES_SHOWN and not everything:
        categories = sorted(categories, key=lambda category: -category.num_boxes)[:_CLASSES_SHOWN]
        title += f": the {_CLASSES_SHOWN} most frequent of {len(report.categories)}"
    cells = [[c.id, printable(c.name)[:24], f"{c.num_boxes:,}"] for c in categories]
    # Columns are filled from top to bottom.
    columns = min(_COLUMNS, -(-len(cells) // 10))
    height = -(-len(cells) // columns)
    rows = [sum(cells[row::height], []) for row in range(height)]
    headers = ["id", "class", "boxes"] * columns
    align = ("right", "left", "right") * columns
    return f"{title}\n\n{tabulate(rows, headers, colalign=align, **_PIPES)}"


def _id_note(report):
    ids = [category.id for category in report.categories]
    # Empty where there is nothing to note.
    if ids == list(range(1, len(ids) + 1)):
        return ""
    return (
        f"Category ids are not 1 to {len(ids)}, which is fine: in the order of their ids "
        f"detectron2 numbers the classes 0 to {len(ids) - 1}."
    )


def _kinds(report):
    return [(s, kind) for s in ("error", "warning") for kind in report.kinds(s)]


def _overview(report):
    rows = [
        [severity, kind.title, _count(report, kind), _effect(report, severity, kind)]
        for severity, kind in _kinds(report)
    ]
    headers = ["", "problem", "count", "what follows"]
    align = ("left", "left", "right", "left")
    return f"Problems\n\n{tabulate(rows, headers, colalign=align, **_PIPES)}" if rows else ""


def _effect(report, severity, kind):
    if kind.severity == "error" and severity == "warning":
        return f"refused in {'training' if kind.training else 'evaluation'}"
    return kind.effect


def _details(report):
    blocks = []
    for severity, kind in _kinds(report):
        count, examples = report.counts[kind], report.examples(kind)
        lines = [f"{severity}: {kind.title} ({_count(report, kind)})"]
        lines += [f"  {printable(problem.message)}" for problem in examples]
        if count > len(examples):
            lines.append(f"  ... and {count - len(examples):,} more, which --all lists")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _verdict(report):
    found = ", ".join(
        f"{report.count(severity):,} {severity}{'' if report.count(severity) == 1 else 's'}"
        for severity in ("error", "warning")
    )
    uses = {True: "training", False: "evaluation"}
    accepted = [name for use, name in uses.items() if report.is_accepted(use)]
    if not accepted or not report.is_accepted(report.training):
        return f"{found}: these data are refused."
    if report.training is not None:
        accepted = [uses[report.training]]
    unseen = "" if report.has_decoded else ", if their images can be read, which --pixels looks at"
    return f"{found}: these data can be used for {' and '.join(accepted)}{unseen}."

"""A report on a data set as text."""

from tabulate import tabulate

from ..utils.text import printable
from .coco_entries import NOT_COCO, Kind, Problem
from .validation import CocoReport

_CLASSES_SHOWN = 40
_COLUMNS = 3
_IDS_SHOWN = 5
_USES = {True: "training", False: "evaluation", None: "training or evaluation"}
_PIPES = {"tablefmt": "github", "disable_numparse": True}


def describe_report(report: CocoReport, *, everything: bool = False) -> str:
    """Describe for a terminal what the data hold, the classes, and the problems by kind.

    Args:
        report: with all problems that shall be listed.
        everything: list all classes, not only the most frequent ones.
    """
    files = f"{printable(report.json_file)} with images in {printable(report.image_root)}"
    parts = [f"{files}, for {_USES[report.training]}"]
    if NOT_COCO not in report.counts:
        rows = [
            ["images", f"{report.num_images:,}"],
            ["images without annotations", f"{report.num_unannotated:,}"],
            ["annotations", f"{report.num_annotations:,}"],
            ["crowds among them", f"{report.num_crowds:,}"],
            ["classes", f"{len(report.categories):,}"],
        ]
        contents = tabulate(rows, tablefmt="plain", colalign=("left", "right"))
        parts += [contents, _classes(report, everything), _id_note(report)]
    parts += [*_problems(report), _verdict(report)]
    return "\n\n".join(filter(None, parts))


def summarize_warnings(report: CocoReport) -> list[str]:
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


def _identity(problem: Problem) -> str:
    if problem.annotation_id is not None:
        return f"annotation {problem.annotation_id}"
    return f"image {problem.image_id}" if problem.image_id is not None else problem.message


def _count(report: CocoReport, kind: Kind) -> str:
    count = report.counts[kind]
    if not kind.has_share:
        return f"{count:,}"
    return f"{count:,} of {report.num_annotations:,}, {count / report.num_annotations:.1%}"


def _classes(report: CocoReport, everything: bool) -> str:
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


def _id_note(report: CocoReport) -> str:
    ids = [category.id for category in report.categories]
    if ids == list(range(1, len(ids) + 1)):
        return ""
    return (
        f"Category ids are not 1 to {len(ids)}, which is fine: in the order of their ids "
        f"detectron2 numbers the classes 0 to {len(ids) - 1}."
    )


def _problems(report: CocoReport) -> list[str]:
    """Return a table of the kinds of problems, and the problems of each kind."""
    rows, blocks = [], []
    for severity in ("error", "warning"):
        for kind in report.kinds(severity):
            is_refused = kind.severity == "error" and severity == "warning"
            effect = f"refused in {_USES[kind.training]}" if is_refused else kind.effect
            rows.append([severity, kind.title, _count(report, kind), effect])
            examples = report.examples(kind)
            lines = [f"{severity}: {kind.title} ({_count(report, kind)})"]
            lines += [f"  {printable(problem.message)}" for problem in examples]
            if more := report.counts[kind] - len(examples):
                lines.append(f"  ... and {more:,} more, which --all lists")
            blocks.append("\n".join(lines))
    headers = ["", "problem", "count", "what follows"]
    align = ("left", "left", "right", "left")
    table = f"Problems\n\n{tabulate(rows, headers, colalign=align, **_PIPES)}" if rows else ""
    return [table, *blocks]


def _verdict(report: CocoReport) -> str:
    counts = {severity: report.count(severity) for severity in ("error", "warning")}
    found = ", ".join(f"{n:,} {severity}{'s' * (n != 1)}" for severity, n in counts.items())
    asked = (True, False) if report.training is None else (report.training,)
    accepted = [_USES[use] for use in asked if report.is_accepted(use)]
    if not accepted:
        return f"{found}: these data are refused."
    unseen = (
        "" if report.has_decoded else "; whether the images can be read is checked with --pixels"
    )
    return f"{found}: these data can be used for {' and '.join(accepted)}{unseen}."

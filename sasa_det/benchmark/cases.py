"""The groups of cases, and where they are."""

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec

from ..errors import UsageError
from .measure import Case, Settings

# Each group's module here, which has it in CASES.
GROUPS = {
    "op": "operators",
    "layer": "operators",
    "stem": "operators",
    "backbone": "models",
    "retinanet": "models",
    "digits": "models",
    "kernel_size": "operators",
    "image_size": "operators",
    "trainer": "training",
    "aggregation": "aggregation",
    "san": "san",
}
_NEED_DETECTRON2 = ("models", "training", "san")


def choose_groups(words: str | None) -> list[str]:
    """Return the groups that a command line asks for, in the order of GROUPS.

    Args:
        words: names with commas between; None for all that run with what is installed.

    Raises:
        UsageError: if there is no such group, or detectron2, which it needs, is not installed.
    """
    missing = groups_without_detectron2()
    if words is None:
        return [group for group in GROUPS if group not in missing]
    groups = words.split(",")
    unknown = sorted(set(groups) - set(GROUPS))
    if unknown:
        raise UsageError(f"--cases takes {', '.join(GROUPS)}, got {', '.join(unknown)}.")
    if needy := [group for group in missing if group in groups]:
        raise UsageError(f"--cases {','.join(needy)} needs detectron2, which is not installed.")
    return [group for group in GROUPS if group in groups]


def groups_without_detectron2() -> list[str]:
    """Return the groups that cannot run because detectron2 is not installed."""
    if find_spec("detectron2") is not None:
        return []
    return [group for group, module in GROUPS.items() if module in _NEED_DETECTRON2]


def make_cases(settings: Settings, groups: Iterable[str]) -> list[Case]:
    """Return the cases of the given groups."""
    cases = []
    for group in groups:
        module = import_module(f".{GROUPS[group]}", __package__)
        cases += module.CASES[group](settings)
    return cases

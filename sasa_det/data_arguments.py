"""The words that name data on a command line; it needs neither detectron2 nor a model."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from itertools import takewhile

DATA_HELP = (
    "COCO-format json and image folder, a YOLO data.yaml, or a Pascal VOC folder; the last two may "
    "have the name of a split behind them, which is {split} by default"
)

DEFAULT_SPLITS = {"train": "train", "test": "val"}

# A key of a yaml config, or key=value of a LazyConfig.
_OVERRIDE = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*|.*=.*")


def data_format(path: str) -> str:
    """Return the format of data by the path that names them.

    Args:
        path: of a file, which need not be there, or a folder.

    Returns:
        str: "yolo" for a yaml file, "coco" for other files, and "voc" for a folder.
    """
    if path.lower().endswith((".yaml", ".yml")):
        return "yolo"
    is_file = path.lower().endswith(".json") or "://" in path or os.path.isfile(path)
    return "coco" if is_file and not os.path.isdir(path) else "voc"


class DataParser(argparse.ArgumentParser):
    """Takes one or two words that name data after a flag, and no KEY of the overrides after these.

    argparse alone would take all words up to the next flag.
    """

    def add_data_argument(self, split: str, group=None, *, flag: str = "", **options) -> None:
        """Add the flag of the data to train or to test on.

        Args:
            split: "train" or "test".
            group: of arguments, to add it to.
            flag: what it is called, instead of by its split.
            **options: of ``add_argument``.
        """
        defaults = {
            "nargs": "+",
            "action": _Words,
            "metavar": ("DATA", "IMAGES|SPLIT"),
            "help": DATA_HELP.format(split=DEFAULT_SPLITS[split]),
        }
        (group or self).add_argument(flag or f"--{split}", **(defaults | options))

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        has_overrides = any(action.nargs == argparse.REMAINDER for action in self._actions)
        if has_overrides:
            for index in reversed(range(len(words))):
                action = self._option_string_actions.get(words[index])
                if isinstance(action, _Words):
                    end = index + 1 + _num_words(words[index + 1 :])
                    if end < len(words) and not words[end].startswith("-"):
                        words.insert(end, "--")
        return super().parse_known_args(words, namespace)


def _num_words(words: Sequence[str]) -> int:
    """Return how many of the words after a flag name data."""
    words = list(takewhile(lambda word: not word.startswith("-"), words))
    if len(words) < 2:
        return len(words)
    is_override = _OVERRIDE.fullmatch(words[1]) is not None
    if data_format(words[0]) == "coco":
        # A folder may have such a name, and the overrides behind it come in pairs.
        in_pairs = "=" in words[1] or len(words) % 2 == 1
        is_override = is_override and in_pairs and not os.path.isdir(words[1])
    return 1 if is_override else 2


class _Words(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        if problem := words_problem(values):
            parser.error(f"argument {'/'.join(self.option_strings)}: {problem}")
        setattr(namespace, self.dest, values)


def words_problem(words: Sequence[str]) -> str | None:
    """Return a clause about words that do not name data, or None."""
    if len(words) > 2:
        return f"expected data and their image folder or split, got {len(words)} words"
    if len(words) == 1 and data_format(words[0]) == "coco":
        return f"expected the image folder of {words[0]} behind it"
    return None

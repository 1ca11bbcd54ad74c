"""The full keys of configs, and what is wrong with a key or with the type of its value."""

import re
from collections.abc import Mapping
from typing import Any

from ..errors import nearest

# What yacs raises over keys and values, and Python over values it cannot read.
CONFIG_ERRORS = (
    AssertionError,
    AttributeError,
    KeyError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)

_MISSING = re.compile(r"Non-existent (?:config )?key: (.*)")

_MISMATCH = re.compile(r"Type mismatch \(<class '([\w.]+)'>.* for config key: (\S+)", re.DOTALL)

_TYPES = {
    "bool": "True or False",
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "list": "a list",
    "tuple": "a list",
}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their full keys, as in ``MODEL.SASA.STEM``.

    Args:
        values: a config, or what was read from a yaml file.
        prefix: what all keys begin with.

    Returns:
        dict[str, Any]: no value is a mapping.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def with_floats(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values with integers as floats where the defaults are floats.

    yacs refuses ``MAX_EPOCHS: 50`` for a key whose default is 0.0.
    """
    given = dict(values)
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            given[key] = with_floats(value, default)
        elif type(value) is int and type(default) is float:
            given[key] = float(value)
    return given


def all_keys(cfg: Mapping[str, Any]) -> list[str]:
    """List the full keys of a config, including the keys of its sections."""
    keys = dict.fromkeys(flatten(cfg))
    for key in list(keys):
        while "." in key:
            key = key.rpartition(".")[0]
            keys[key] = None
    return list(keys)


def unknown_key(key: str, cfg: Mapping[str, Any]) -> str:
    """Say that a config has no such key, and which is the nearest one."""
    known = all_keys(cfg)
    if key in known:
        return f"config key {key} must be written as a key in a section, not with dots."
    return f"config key {key} does not exist{nearest(key, known)}"


def explain(error: Exception, cfg: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Turn an error of yacs into one sentence.

    Args:
        error: one of :data:`CONFIG_ERRORS`, raised by changing the config.
        cfg: the config.
        given: by full key, the values it was to take.
    """
    message = str(error.args[0] if error.args else repr(error)).strip()
    missing = _MISSING.fullmatch(message)
    if missing:
        return unknown_key(missing[1], cfg)
    mismatch = _MISMATCH.fullmatch(message)
    if mismatch:
        needed = _TYPES.get(mismatch[1], "a section of keys")
        got = repr(given[mismatch[2]]) if mismatch[2] in given else "a section of keys"
        return f"{mismatch[2]} must be {needed}, got {got}."
    return message.splitlines()[0]

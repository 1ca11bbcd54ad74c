"""What wrappers and trainers put into the names of a model's weights."""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from ..errors import CheckpointError

# Of torch.compile, FSDP and activation checkpointing, wherever a module was wrapped.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def without_wrappers(name: str) -> str:
    """Take the parts of a weight's name out that stand for a wrapper of a module."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def common_prefixes(names: Iterable[str]) -> Iterator[str]:
    """List what all names begin with, up to a dot: "", "module.", "module.model.", and so on."""
    names, prefix = list(names), ""
    while names:
        yield prefix
        first, dot, _ = names[0].removeprefix(prefix).partition(".")
        prefix += f"{first}."
        if not dot or not all(name.startswith(prefix) for name in names):
            return


def named_as(model: Collection[str], weights: dict[str, Any]) -> dict[str, Any]:
    """Give weights the names of a model's, if the two differ by wrappers and a common prefix.

    Args:
        model: names of the model's weights.
        weights: by name.

    Returns:
        dict: the same in the same order; names of the model's are kept.

    Raises:
        CheckpointError: if two weights would have one name.
    """
    bare = {name: name if name in model else without_wrappers(name) for name in weights}
    for prefix in common_prefixes(bare.values()):
        if any(name.removeprefix(prefix) in model for name in bare.values()):
            bare = {name: short.removeprefix(prefix) for name, short in bare.items()}
            break
    renamed = {bare[name]: weight for name, weight in weights.items()}
    if len(renamed) != len(weights):
        raise CheckpointError("some of its weights differ in their names by a wrapper's part alone")
    return renamed

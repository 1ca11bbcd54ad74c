"""Registered data sets: their classes, and the order of these."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MapDataset, Metadata, MetadataCatalog

from ..errors import DatasetError, nearest
from ..utils.text import printable

logger = logging.getLogger(__name__)

# Parts of a data set, and the folders that hold them.
SPLITS = ("train", "val")


def builtin_path(*parts: str) -> str:
    """Return a path under ``$DETECTRON2_DATASETS``, which is ``datasets`` unless it is set."""
    root = os.getenv("DETECTRON2_DATASETS", "datasets")
    return os.path.join(os.path.expanduser(root), *parts)


def root_hint() -> str:
    """Say, for a message about a missing file, what the root of these data sets is."""
    return f"$DETECTRON2_DATASETS, now {builtin_path()!r}, sets the root of the builtin datasets"


def is_registered(name: str, **expected: Any) -> bool:
    """Return whether a name is registered with these metadata, whatever way paths are spelled.

    Raises:
        DatasetError: if it is registered with others.
    """
    if name not in DatasetCatalog:
        return False
    metadata = MetadataCatalog.get(name)
    found = {key: metadata.get(key) for key in expected}
    if any(_real(found[key]) != _real(value) for key, value in expected.items()):
        raise DatasetError(
            f"dataset {name!r} is already registered with {found}, not with {expected}: give the "
            "new data another name"
        )
    return True


def _real(value: Any) -> Any:
    return os.path.realpath(value) if isinstance(value, str) else value


def num_classes_of(dataset_names: Sequence[str]) -> int:
    """Return the number of classes of registered data sets.

    A data set is loaded if its classes are not known before, as those of detectron2's
    ``register_coco_instances`` are not.

    Args:
        dataset_names: as in ``cfg.DATASETS.TRAIN``, at least one.

    Raises:
        DatasetError: if there are no names, a name is not registered, its classes are not known, or
            the data sets do not have the same classes.
    """
    if not dataset_names:
        raise DatasetError("no dataset is named: at least one registered dataset is needed")
    classes = {name: _classes_of(name) for name in dataset_names}
    first, *others = dataset_names
    check_same_classes(others, classes[first], f"dataset {first!r}")
    return len(classes[first])


def _classes_of(name: str) -> list[str]:
    metadata = metadata_of(name)
    if metadata.get("thing_classes") is None:
        DatasetCatalog.get(name)  # which may set them
    classes = metadata.get("thing_classes")
    if classes is None:
        raise DatasetError(
            f"dataset {name!r} has no 'thing_classes' in its metadata, also after it was loaded: "
            "register it with sasa_det.data.register_coco or set them"
        )
    return classes


def metadata_of(name: str) -> Metadata:
    """Return the metadata of a registered data set.

    Raises:
        DatasetError: if the name is not registered; the message has the nearest one that is.
    """
    if name not in DatasetCatalog:
        raise DatasetError(f"dataset {name!r} is not registered{nearest(name, DatasetCatalog)}")
    return MetadataCatalog.get(name)


def category_ids(name: str) -> list[int]:
    """Return the ids of the classes in the files of a data set, in the order of its class indices.

    Args:
        name: of a data set; it must have been loaded if its classes are read from its files.

    Returns:
        list[int]: empty if the classes have no ids, or are not known yet.
    """
    ids = MetadataCatalog.get(name).get("thing_dataset_id_to_contiguous_id") or {}
    return sorted(ids, key=ids.get)


def are_same_classes(names: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether classes have the same names, in any order if no name stands for two."""
    same = sorted(names) == sorted(others)
    return list(names) == list(others) or (same and len(set(names)) == len(names))


def shortened(names: Sequence[str]) -> str:
    """Say how many classes there are, and the names of the first ones."""
    shown = ", ".join(map(printable, names[:3])) + (", ..." if len(names) > 3 else "")
    return f"{len(names)}: {shown}"


# The metadata that belong to class indices.
_INDEXED = ("thing_classes", "thing_dataset_id_to_contiguous_id", "thing_colors")


def warn_of_classes(known: Sequence[str] | None, classes: Sequence[str]) -> None:
    """Log a warning if training data have as many, but not the known classes of the weights."""
    if known is not None and len(known) == len(classes) and list(known) != list(classes):
        logger.warning(
            "The weights were trained for the classes %s, and the training data have %s: what "
            "they know of a class counts for the one in its place.",
            shortened(known),
            shortened(classes),
        )


def check_same_classes(names: Sequence[str], classes: Sequence[str], owner: str) -> None:
    """Raise DatasetError unless data sets have the classes of an owner, in any order.

    Args:
        names: registered data sets; one whose classes are not known yet is left out.
        classes: of the owner, as a model.
        owner: its name in the message.
    """
    for name in names:
        own = metadata_of(name).get("thing_classes")
        if own is None or are_same_classes(own, classes):
            continue
        sides = {"first": set(own) - set(classes), "second": set(classes) - set(own)}
        alone = {side: sorted(names) for side, names in sides.items() if names}
        parts = [f"{shortened(names)} in the {side} alone" for side, names in alone.items()]
        differences = f", {' and '.join(parts)}" if parts else ""
        raise DatasetError(
            f"dataset {name!r} ({shortened(own)}) and {owner} ({shortened(classes)}) have "
            f"different classes{differences}: they must have the same ones"
        )


def follow_classes(
    names: Sequence[str], classes: Sequence[str] | None = None, owner: str = ""
) -> None:
    """Let the class indices of data sets be those of a model, whenever the data are loaded.

    Of a data set with the same classes in another order, annotations and metadata are changed.

    Args:
        names: registered data sets.
        classes: of the model in the order of its indices; None for those of the first data set.
        owner: whose they are, for the log.

    Raises:
        DatasetError: as :func:`check_same_classes`; also when the data are loaded.
    """
    if classes is None:
        if not names:
            return
        first, *names = names
        owner = f"dataset {first!r}"
        order = partial(MetadataCatalog.get(first).get, "thing_classes")
    else:
        order = partial(list, classes)
    for name in names:
        own = {key: vars(metadata_of(name)).get(key) for key in _INDEXED}
        load = DatasetCatalog.pop(name)
        if isinstance(load, partial) and load.func is _load_in_order:
            _, load, own, *_ = load.args
        DatasetCatalog.register(name, partial(_load_in_order, name, load, own, order, owner))


def _load_in_order(
    name: str,
    load: Callable[[], Sequence[dict[str, Any]]],
    own: Mapping[str, Any],
    order: Callable[[], Sequence[str] | None],
    owner: str,
) -> Sequence[dict[str, Any]]:
    # Not through setattr, by which detectron2 refuses to change metadata.
    metadata = vars(MetadataCatalog.get(name))
    for key, value in own.items():
        metadata.pop(key, None)
        if value is not None:
            metadata[key] = value
    records = load()
    classes, names = order(), metadata.get("thing_classes")
    if classes is None or names is None or list(names) == list(classes):
        return records
    check_same_classes([name], classes, owner)
    logger.warning(
        "The classes of dataset %r come in another order than those of %s: its class indices are "
        "mapped to the latter.",
        name,
        owner,
    )
    index = [classes.index(class_name) for class_name in names]
    ids = metadata.get("thing_dataset_id_to_contiguous_id")
    if ids is not None:
        ids = {identity: index[number] for identity, number in ids.items()}
        metadata["thing_dataset_id_to_contiguous_id"] = ids
    for key in {"thing_classes", "thing_colors"} & metadata.keys():
        metadata[key] = [metadata[key][index.index(number)] for number in range(len(index))]
    # Those that are made when they are asked for still are.
    mapped = MapDataset(records, partial(_reindexed, index))
    return list(mapped) if isinstance(records, list) else mapped


def _reindexed(index: Sequence[int], record: dict[str, Any]) -> dict[str, Any]:
    record = dict(record)
    if "label" in record:
        record["label"] = index[record["label"]]
    if "annotations" in record:
        record["annotations"] = [
            {**annotation, "category_id": index[annotation["category_id"]]}
            for annotation in record["annotations"]
        ]
    return record

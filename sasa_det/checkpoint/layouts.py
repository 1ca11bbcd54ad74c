"""How checkpoints of this project and of others name the weights of a backbone."""

import re
from collections.abc import Collection
from typing import Any, NamedTuple

from ..errors import CheckpointError
from .matching import backbone_names
from .prefixes import common_prefixes, without_wrappers
from .preprocessing import IMAGENET

# Patterns of names, and what stands for them. A stage of 1 to 4 is res2 to res5, 0 is the stem.
_BLOCK = r"layer(?P<stage>[0-4])\.(?P<block>\d+)\."
_RESNET_NAMES = {
    r"conv1\.weight": "stem.conv1.weight",
    r"bn1\.(?P<rest>\w+)": "stem.conv1.norm.{rest}",
    _BLOCK + r"conv(?P<n>[123])\.weight": "{stage}.{block}.conv{n}.weight",
    _BLOCK + r"bn(?P<n>[123])\.(?P<rest>\w+)": "{stage}.{block}.conv{n}.norm.{rest}",
    _BLOCK + r"downsample\.0\.weight": "{stage}.{block}.shortcut.weight",
    _BLOCK + r"downsample\.1\.(?P<rest>\w+)": "{stage}.{block}.shortcut.norm.{rest}",
    r"fc\.(?P<rest>\w+)": "linear.{rest}",
}
_SAN_NAMES = {
    r"conv_in\.weight": "stem.conv.weight",
    r"bn_in\.(?P<rest>\w+)": "stem.norm.{rest}",
    r"conv(?P<stage>[0-4])\.weight": "{stage}.transition.weight",
    r"bn(?P<stage>[0-4])\.(?P<rest>\w+)": "{stage}.out_norm.{rest}",
    _BLOCK + r"bn(?P<n>[12])\.(?P<rest>\w+)": "{stage}.blocks.{block}.norm{n}.{rest}",
    _BLOCK + r"sam\.conv1\.(?P<rest>\w+)": "{stage}.blocks.{block}.attention.query.{rest}",
    _BLOCK + r"sam\.conv2\.(?P<rest>\w+)": "{stage}.blocks.{block}.attention.key.{rest}",
    _BLOCK + r"sam\.conv3\.(?P<rest>\w+)": "{stage}.blocks.{block}.attention.value.{rest}",
    _BLOCK + r"sam\.conv_w\.(?P<rest>\d\.\w+)": "{stage}.blocks.{block}.attention.weights.{rest}",
    _BLOCK + r"sam\.conv_p\.(?P<rest>\w+)": "{stage}.blocks.{block}.attention.position.{rest}",
    _BLOCK + r"conv\.(?P<rest>\w+)": "{stage}.blocks.{block}.project.{rest}",
    r"fc\.(?P<rest>\w+)": "linear.{rest}",
}


class Layout(NamedTuple):
    """The names that a kind of checkpoint uses.

    Attributes:
        owner: whose checkpoints they are, for messages.
        marks: beginnings of names by which it is recognized.
        patterns: of names, and what stands for them in a backbone of this project; None if they
            are the same but for what a model puts before them.
        preprocessing: of images, where the layout alone tells it.
        convolutional: whether it is a ResNet without attention.
        prefix: what a trainer put before the names of the network.
    """

    owner: str
    marks: tuple[str, ...]
    patterns: dict[str, str] | None = None
    preprocessing: dict[str, Any] | None = None
    convolutional: bool = False
    prefix: str = ""

    @property
    def foreign(self) -> bool:
        """Whether it is of a project whose models are not those of this one."""
        return self.patterns is not None

    def bare(self, names: Collection[str]) -> dict[str, str]:
        """Name the weights of the network without the prefix and the parts of wrappers."""
        clean = {name: without_wrappers(name) for name in names}
        return {
            name: short.removeprefix(self.prefix)
            for name, short in clean.items()
            if short.startswith(self.prefix)
        }

    def rename(self, names: Collection[str]) -> dict[str, str]:
        """Name weights as a backbone of this project, those that are known to the layout."""
        bare = self.bare(names)
        if self.patterns is None:
            ours = backbone_names(bare.values())
            return {name: ours[short] for name, short in bare.items() if short in ours}
        renamed = {}
        for name, short in bare.items():
            for pattern, template in self.patterns.items():
                if match := re.fullmatch(pattern, short):
                    parts = match.groupdict()
                    stage = int(parts.pop("stage", 0))
                    parts["stage"] = f"res{stage + 1}" if stage else "stem"
                    renamed[name] = template.format(**parts)
        return renamed


def recognize(names: Collection[str], prefix: str = "") -> Layout | None:
    """Tell the layout of a checkpoint from the names of its weights; None if it is unknown.

    Args:
        names: of all its weights.
        prefix: what the names of its network begin with, those of other weights not; "" for
            whatever all names begin with.

    Raises:
        CheckpointError: if no name has the prefix.
    """
    clean = [without_wrappers(name) for name in names]
    prefixes = list(common_prefixes(clean))
    if prefix:
        prefix = without_wrappers(prefix.rstrip(".")) + "."
        prefixes = [prefix.removeprefix(".")]
        if not any(name.startswith(prefixes[0]) for name in clean):
            raise CheckpointError(f"none of its weights has a name with the prefix {prefix}")
    for layout in (_SAN, _RESNET, _OWN):
        for found in prefixes:
            bare = [name.removeprefix(found) for name in clean if name.startswith(found)]
            if any(name.startswith(layout.marks) for name in bare):
                return layout._replace(prefix=found)
    return None


_OWN = Layout("this project or detectron2", ("backbone.", "stem.", "res2."))
_RESNET = Layout(
    "torchvision or timm", ("layer1.0.conv1.",), _RESNET_NAMES, IMAGENET, convolutional=True
)
_SAN = Layout("the official SAN release", ("conv_in.",), _SAN_NAMES, IMAGENET)

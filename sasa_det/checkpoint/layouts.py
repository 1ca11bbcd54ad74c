"""How checkpoints of this project and of others name the weights of a backbone."""

import re
from collections.abc import Collection
from typing import Any, NamedTuple

from .matching import backbone_names
from .preprocessing import IMAGENET

__all__ = ["Layout", "recognize"]

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
        patterns: of names, and what stands for them in a backbone of this project; None if they
            are the same but for what a model puts before them.
        preprocessing: of images, where the layout alone tells it.
        convolutional: whether it is a ResNet without attention.
    """

    owner: str
    patterns: dict[str, str] | None = None
    preprocessing: dict[str, Any] | None = None
    convolutional: bool = False

    @property
    def foreign(self) -> bool:
        """Whether it is of a project whose models are not those of this one."""
        return self.patterns is not None

    def rename(self, names: Collection[str]) -> dict[str, str]:
        """Name weights as a backbone of this project, those that are known to the layout."""
        short = _without_wrapper(names)
        if self.patterns is None:
            renamed = backbone_names(short.values())
        else:
            renamed = _renamed(short.values(), self.patterns)
        return {name: renamed[s] for name, s in short.items() if s in renamed}


def recognize(names: Collection[str]) -> Layout | None:
    """Tell the layout of a checkpoint from the names of its weights; None if it is unknown."""
    names = set(_without_wrapper(names).values())
    if "conv_in.weight" in names:
        return _SAN
    if "layer1.0.conv1.weight" in names:
        return _RESNET
    if any(name.startswith(("backbone.", "stem.", "res2.")) for name in names):
        return _OWN
    return None


def _without_wrapper(names: Collection[str]) -> dict[str, str]:
    """Take off what the wrapper of a model on several GPUs puts before all names."""
    wrapped = all(name.startswith("module.") for name in names)
    return {name: name.removeprefix("module.") if wrapped else name for name in names}


def _renamed(names: Collection[str], patterns: dict[str, str]) -> dict[str, str]:
    renamed = {}
    for name in names:
        for pattern, template in patterns.items():
            if match := re.fullmatch(pattern, name):
                parts = match.groupdict()
                stage = int(parts.pop("stage", 0))
                parts["stage"] = f"res{stage + 1}" if stage else "stem"
                renamed[name] = template.format(**parts)
    return renamed


_OWN = Layout("this project or detectron2")
_RESNET = Layout("torchvision or timm", _RESNET_NAMES, IMAGENET, convolutional=True)
_SAN = Layout("the official SAN release", _SAN_NAMES, IMAGENET)

"""What a benchmark is made of: cases, their contenders, and results."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["Case", "Contender", "Result", "Run", "Settings"]

Run = Callable[[], object]


@dataclass(frozen=True)
class Settings:
    """What all cases of a run share.

    Attributes:
        device: "cpu" or "cuda".
        dtype: type of features and weights.
        batch: images in a batch.
        image_size: side of the square images in pixels; features are those of stride 8.
        configs: the project's folder of configs.
    """

    device: str
    dtype: torch.dtype
    batch: int
    image_size: int
    configs: Path

    def features(self, channels: int, size: int) -> Tensor:
        shape = (self.batch, channels, size, size)
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def place(self, module: nn.Module) -> nn.Module:
        return module.to(self.device, self.dtype)


@dataclass(frozen=True)
class Contender:
    """One way of doing what a case measures.

    Attributes:
        name: as it stands in the table.
        make: builds everything and returns the call to measure.
        foreign: whether it is somebody else's, which may be absent or not run here.
        slow: whether it is many times slower than the others and measured in fewer rounds.
    """

    name: str
    make: Callable[[], Run]
    foreign: bool = False
    slow: bool = False


@dataclass(frozen=True)
class Case:
    """Ways to do one thing; ratios are to the contender named ``baseline``.

    Attributes:
        group: what ``--cases`` selects it by.
        name: unique name.
        title: what is done, with sizes.
        baseline: name of the contender that the others are compared with.
        contenders: the ways.
        memory: whether peak memory is measured too.
        at: place on the axis of a growth case, a kernel size or an image size.
    """

    group: str
    name: str
    title: str
    baseline: str
    contenders: tuple[Contender, ...]
    memory: bool = False
    at: int | None = None


@dataclass
class Result:
    """What was measured of one contender.

    Attributes:
        case: name of the case.
        contender: name of the contender.
        baseline: name of the contender it is compared with.
        seconds: median of a call; None if it did not run.
        memory: extra bytes of a call at its peak; None if not measured.
        why_not: why it did not run, or None.
    """

    case: str
    contender: str
    baseline: str
    seconds: float | None = None
    memory: int | None = None
    why_not: str | None = None

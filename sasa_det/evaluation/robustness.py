"""Accuracy of a classifier on images that are rotated, flipped or attacked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.evaluation import DatasetEvaluator
from torch import Tensor, nn

from ..modeling import Classifier

UNTOUCHED = "untouched"

# Of (..., H, W) images; rotations are counterclockwise.
TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    UNTOUCHED: lambda images: images,
    **{
        f"rotated by {90 * quarters}°": partial(torch.rot90, k=quarters, dims=(-2, -1))
        for quarters in (1, 2, 3)
    },
    "upside down": lambda images: images.flip(-2),
    "mirrored": lambda images: images.flip(-1),
}


@dataclass(frozen=True)
class Attack:
    """Projected gradient descent, untargeted, with a bound on the change of every pixel.

    From a random place within the bound, each step moves every pixel by the same amount in the
    direction in which the loss of the label rises ("Towards Deep Learning Models Resistant to
    Adversarial Attacks", Madry et al., 2018).

    Attributes:
        epsilon: largest change of a pixel, in units of 0 to 255.
        step: change of a pixel in a step, in the same units.
        steps: their number.
        seed: of the random places, which are the same for all classifiers.
    """

    epsilon: float = 8.0
    step: float = 2.0
    steps: int = 10
    seed: int = 0

    @property
    def name(self) -> str:
        return f"attacked by {self.epsilon:g}"

    def __str__(self) -> str:
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return f"PGD of {steps} of {self.step:g} within {self.epsilon:g} of 255"


def attack_images(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Change images so that a classifier errs.

    Args:
        classifier: in eval mode.
        images: (N, C, H, W), in 0 to 255.
        labels: (N,) int64, of the classes that the classifier shall not see.
        attack: its strength.
        generator: of random numbers on the CPU; one with the attack's seed by default.

    Returns:
        (N, C, H, W) float32, in 0 to 255 and within ``attack.epsilon`` of ``images``.
    """
    generator = generator or torch.Generator().manual_seed(attack.seed)
    images = images.float()
    lowest = (images - attack.epsilon).clamp(min=0)
    highest = (images + attack.epsilon).clamp(max=255)
    start = torch.empty(images.shape).uniform_(-attack.epsilon, attack.epsilon, generator=generator)
    changed = (images + start.to(images.device)).clamp(lowest, highest)
    for _ in range(attack.steps):
        with torch.enable_grad():
            changed.requires_grad_()
            # A sum, so that no image's gradient depends on the batch.
            loss = F.cross_entropy(classifier.logits(changed).float(), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, changed)
        changed = (changed.detach() + attack.step * gradient.sign()).clamp(lowest, highest)
    return changed


def probe_classifier(
    classifier: Classifier,
    batches: Iterable[Mapping[str, Any]],
    make_evaluator: Callable[[], DatasetEvaluator],
    attacks: Iterable[Attack] = (),
) -> dict[str, float]:
    """Measure how often a classifier is right about images as they are, transformed and attacked.

    Args:
        classifier: in eval mode.
        batches: of a classification test loader.
        make_evaluator: makes a :class:`~sasa_det.evaluation.accuracy.ClassificationEvaluator`.
        attacks: of different names.

    Returns:
        dict[str, float]: top-1 in percent, by the names of :data:`TRANSFORMS` and of the attacks.

    Raises:
        DatasetError: if more images than allowed cannot be read.
    """
    attacks = {attack: torch.Generator().manual_seed(attack.seed) for attack in attacks}
    names = [*TRANSFORMS, *(attack.name for attack in attacks)]
    evaluators = {name: make_evaluator() for name in names}
    for evaluator in evaluators.values():
        evaluator.reset()
    with _fixed(classifier), torch.no_grad():
        for batch in batches:
            # Images that could not be read are told once.
            evaluators[UNTOUCHED].process({**batch, "label": batch["label"][:0]}, [])
            if not len(batch["label"]):
                continue
            labels = {"label": batch["label"]}
            images = batch["image"].to(classifier.device)
            for name, transform in TRANSFORMS.items():
                evaluators[name].process(labels, classifier({"image": transform(images)}))
            for attack, generator in attacks.items():
                changed = attack_images(
                    classifier, images, batch["label"].to(images.device), attack, generator
                )
                evaluators[attack.name].process(labels, classifier({"image": changed}))
    return {name: each.evaluate()["classification"]["top1"] for name, each in evaluators.items()}


@contextmanager
def _fixed(model: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient, which would take time."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)

"""Handwritten digits, and how they are drawn on textured backgrounds."""

import numpy as np
from PIL import Image

DIGIT_NAMES = tuple(str(digit) for digit in range(10))

VAL_FRACTION = 0.2
# Heights of the ink, as fractions of the detection set's side: 24 to 64 pixels at 128.
HEIGHT_RANGE = (0.1875, 0.5)
# Difference in luminance (0..255) between the ink, which is light, and the mean of the background
# in its box.
CONTRAST_RANGE = (70.0, 150.0)
# The mean luminance of a background; there is room for the contrast above it.
BACKGROUND_RANGE = (30.0, 125.0)
LUMINANCE = np.array([0.299, 0.587, 0.114])


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return (1797, 8, 8) float32 ink in 0..1 and (1797,) int64 labels."""
    from sklearn import datasets

    source = datasets.load_digits()
    return (source.images / 16).astype(np.float32), source.target.astype(np.int64)


def split_digits(seed: int = 0, tuning: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Split scikit-learn's handwritten digits into training and validation, class by class.

    Args:
        seed: of the split.
        tuning: whether to split the training digits alone, so that rates and schedules can be
            chosen without a look at the validation digits.

    Returns:
        tuple: sorted int64 indices into ``sklearn.datasets.load_digits()`` of the training digits
        (about 80 % of every class) and of the validation digits.
    """
    labels = load_digits()[1]
    rng = np.random.default_rng(seed)
    digits, val = _split(np.arange(len(labels)), labels, rng)
    return _split(digits, labels, rng) if tuning else (digits, val)


def _split(
    digits: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    val = []
    for digit in range(10):
        members = rng.permutation(digits[labels[digits] == digit])
        val.append(members[: round(VAL_FRACTION * len(members))])
    val = np.sort(np.concatenate(val))
    return np.setdiff1d(digits, val), val


def scaled_ink(digit: np.ndarray, height: float) -> np.ndarray:
    """Scale a digit so that its ink is about ``height`` pixels high, and cut it out tightly.

    Returns:
        numpy.ndarray: (h, w) float32 opacity in 0..1; no border row or column is empty.
    """
    digit = _without_empty_border(digit)
    scale = height / digit.shape[0]
    digit = np.pad(digit, 1)
    size = (round(digit.shape[1] * scale), round(digit.shape[0] * scale))
    smooth = _resized(digit, size)
    # Eight pixels enlarged are a blur: a steep ramp makes strokes with an edge of them. What would
    # hardly be seen is left out, so that the box is that of the visible ink.
    alpha = np.clip((smooth - 0.2) / 0.35, 0, 1)
    alpha[alpha < 0.25] = 0
    return _without_empty_border(alpha)


def _without_empty_border(ink: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BICUBIC))


def draw_background(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a colour gradient with smooth noise of several scales, (size, size, 3) uint8."""
    # Luminance is shared by the channels and colour is not, so the texture has both.
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:size, 0:size] / (size - 1) - 0.5
    ramp = (np.cos(angle) * x + np.sin(angle) * y)[..., None]
    texture = ramp * (rng.uniform(-25, 25) + rng.uniform(-40, 40, size=3))
    strength = rng.uniform(0.5, 1.0)
    for cells in (3, 6, 12, 24, 48):
        amplitude = strength * 14 * (cells / 3) ** -0.35
        noise = rng.normal(0, amplitude, (cells, cells, 1)) + rng.normal(
            0, 0.6 * amplitude, (cells, cells, 3)
        )
        channels = np.moveaxis(noise.astype(np.float32), -1, 0)
        resized = [_resized(channel, (size, size)) for channel in channels]
        texture = texture + np.stack(resized, axis=-1)
    base = _with_luminance(rng.uniform(0, 255, size=3), rng.uniform(*BACKGROUND_RANGE))
    return np.clip(np.rint(base + texture), 0, 255).astype(np.uint8)


def paint(
    image: np.ndarray,
    background: np.ndarray,
    place: tuple[slice, slice],
    alpha: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """Paint a digit in a colour that stands out from the background there.

    Args:
        image: (H, W, 3) uint8 RGB, changed in place; the background is this without any digit.
        place: the rows and columns to paint, with the (h, w) float32 opacity ``alpha`` in 0..1.
    """
    level = float(background[place].mean(axis=(0, 1)) @ LUMINANCE)
    target = min(level + rng.uniform(*CONTRAST_RANGE), 255.0)
    colour = _with_luminance(rng.uniform(0, 255, size=3), target)
    blend = alpha[..., None]
    image[place] = np.rint(image[place] * (1 - blend) + colour * blend).astype(np.uint8)


def _with_luminance(colour: np.ndarray, target: float) -> np.ndarray:
    """Blend a colour with black or white so that it has a given luminance."""
    level = colour @ LUMINANCE
    if target <= level:
        return colour * (target / level)
    return colour + (255 - colour) * ((target - level) / (255 - level))

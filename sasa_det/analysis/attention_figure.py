"""A picture of where a pixel looks in an attention layer, head by head."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ..errors import UsageError
from ..utils.files import whole_file
from ..utils.text import without_formulas
from .attention_maps import AttentionMaps

FIGURE_SUFFIXES = (".png", ".pdf", ".svg")

_DPI = 150

# Sizes in inches; a point of type is 1/72 inch.
_PANEL = 1.25
_GAP = 0.10
_MARGIN = 0.16
_TITLE = 0.24
_HEADER = 0.34
_AXIS = 0.36
_BAR = 0.085
_COLUMNS = 4
_OVERVIEW = 2.2

_FONT_SIZE = 6.5
_TITLE_SIZE = 8
_INK = "#222222"
_FAINT = "#777777"

# The pixel that looks, in a colour that neither the heat nor pictures often have.
_QUERY = "#2ee6d6"

# From the dark of the picture over ember to white.
_HEAT = LinearSegmentedColormap.from_list(
    "attention", ["#120a2a", "#4a1069", "#9b1f6d", "#dd4a3e", "#fb9a2b", "#fde68a", "#fffdf0"]
)

# How much of its light is left of the picture, and how much of the least weight covers it.
_LIGHT = 0.5
_COVER = 0.10

# The part of a picture that is drawn around a window, in windows.
_ROOM = 1.35


def draw_attention(
    maps: AttentionMaps,
    image: np.ndarray,
    path: str | os.PathLike,
    heads: Sequence[int] | None = None,
    source: str = "",
) -> Figure:
    """Draw the windows of a pixel over the image, and below them the mean windows of all pixels.

    All heads share a colour scale, on which a weight's place is its square root.

    Args:
        maps: what to draw.
        image: (H, W, 3) uint8 RGB, of the size that the maps are in.
        path: the file to write, one of :data:`FIGURE_SUFFIXES`.
        heads: to draw; all if None.
        source: what the image is called, for the title.

    Returns:
        Figure: what was drawn.

    Raises:
        UsageError: if the file is of another kind, or the layer has no such head.
    """
    check_figure_path(path)
    heads = range(maps.num_heads) if heads is None else heads
    for head in heads:
        if not 0 <= head < maps.num_heads:
            last = maps.num_heads - 1
            near = min(max(head, 0), last)
            raise UsageError(
                f"layer {maps.layer} has no head {head}: its heads are 0 to {last}; did you mean "
                f"{near}?"
            )
    layout = _Layout(len(heads), maps, image.shape[:2])
    figure = Figure(figsize=layout.size, dpi=_DPI, facecolor="white")
    chosen = list(heads)
    peak = max(float(maps.weights[chosen].max()), float(maps.mean[chosen].max()))
    norm = PowerNorm(0.5, vmin=0, vmax=peak)
    _draw_header(figure, layout, maps, source)
    view = _view(maps, image.shape[:2])
    _draw_overview(layout.axes(figure, *layout.overview()), maps, image)
    _draw_scale(figure, layout, norm, maps)
    for index, head in enumerate(chosen):
        window = layout.axes(figure, *layout.window(index))
        _draw_window(window, maps, head, image, view, norm)
        mean = layout.axes(figure, *layout.mean(index))
        _draw_mean(mean, maps, head, norm, labelled=index % layout.columns == 0)
    if maps.mixing is not None:
        _draw_mixing(figure, layout, maps)
    with whole_file(path) as part:
        figure.savefig(part, format=Path(path).suffix.lower().removeprefix("."))
    return figure


def check_figure_path(path: str | os.PathLike) -> None:
    """Raise UsageError unless a file's name ends in one of :data:`FIGURE_SUFFIXES`."""
    if Path(path).suffix.lower() not in FIGURE_SUFFIXES:
        raise UsageError(f"output {path} must end in {', '.join(FIGURE_SUFFIXES)}.")


class _Layout:
    """Where the panels are, in inches from the left and the top."""

    def __init__(self, num_heads: int, maps: AttentionMaps, image_size: tuple[int, int]):
        self.overview_height = _OVERVIEW * min(image_size[0] / image_size[1], 1.2)
        self.columns = min(num_heads, _COLUMNS)
        self.rows = -(-num_heads // _COLUMNS)
        self.left = _MARGIN + _OVERVIEW + _AXIS + 0.2
        self.block = _TITLE + 2 * _PANEL + _GAP + _AXIS
        across = max(self.columns, 0 if maps.mixing is None else len(maps.mixing))
        width = self.left + across * (_PANEL + _GAP) - _GAP + _MARGIN
        height = _HEADER + self.rows * self.block + _MARGIN / 2
        self.mixing_top = height
        if maps.mixing is not None:
            height += _TITLE + _PANEL + _MARGIN
        # The scale and the caption below the overview.
        height = max(height, _HEADER + _TITLE + self.overview_height + 2.0)
        self.size = max(width, 4.6), height

    def overview(self) -> tuple[float, float, float, float]:
        return _MARGIN, _HEADER + _TITLE, _OVERVIEW, self.overview_height

    def window(self, index: int) -> tuple[float, float, float, float]:
        row, column = divmod(index, self.columns)
        left = self.left + column * (_PANEL + _GAP)
        return left, _HEADER + row * self.block + _TITLE, _PANEL, _PANEL

    def mean(self, index: int) -> tuple[float, float, float, float]:
        left, top, width, height = self.window(index)
        return left, top + _PANEL + _GAP, width, height

    def axes(self, figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
        """Add axes at a place in inches."""
        across, down = self.size
        return figure.add_axes(
            (left / across, 1 - (top + height) / down, width / across, height / down)
        )


def _draw_header(figure: Figure, layout: _Layout, maps: AttentionMaps, source: str) -> None:
    width, height = layout.size
    left = _MARGIN / width
    figure.text(
        left,
        1 - 0.12 / height,
        f"Attention of {maps.layer}",
        fontsize=11,
        fontweight="bold",
        color=_INK,
        va="top",
    )
    figure.text(
        left,
        1 - 0.36 / height,
        without_formulas(source),
        fontsize=_TITLE_SIZE,
        color=_FAINT,
        va="top",
    )


def _caption(maps: AttentionMaps) -> str:
    """Say what is drawn, below the overview."""
    (row, column), (rows, columns) = maps.pixel, maps.map_size
    side = maps.kernel_size
    block = side // 2 + 1
    window = (
        f"{block} × {block} pixels of its block"
        if maps.is_block
        else (f"{side} × {side} pixels around it")
    )
    sentences = [
        f"The pixel in row {row}, column {column} of this layer's {rows} × {columns} map looks at "
        f"the {window}.",
        "Above, its weights in each head. Below, their mean over all pixels, by offset.",
    ]
    if maps.mixing is not None:
        sentences.append("Last, the share of each value matrix at the places of a block.")
    return "\n\n".join(textwrap.fill(sentence, 38) for sentence in sentences)


def _view(maps: AttentionMaps, size: tuple[int, int]) -> tuple[float, float, float]:
    """Return left, top and side of the square of the image that is drawn around the window."""
    side = _ROOM * maps.kernel_size * max(maps.cell)
    side = min(side, max(size))
    (row, column), (height, width) = maps.pixel, maps.cell
    center = (column + 0.5) * width, (row + 0.5) * height
    # In the image as far as it goes.
    left, top = (
        (extent - side) / 2 if extent <= side else min(max(middle - side / 2, 0), extent - side)
        for middle, extent in zip(center, (size[1], size[0]), strict=True)
    )
    return left, top, side


def _place_image(axes: Axes, image: np.ndarray, light: float = 1.0) -> None:
    height, width = image.shape[:2]
    shown = image
    if light < 1:  # grey, so that all colours are those of weights
        grey = image.astype(np.float32) @ (0.299, 0.587, 0.114)
        shown = np.repeat((grey * light).astype(np.uint8)[..., None], 3, -1)
    # Pixel (x, y) covers x..x+1, y..y+1, as it does in detectron2's box coordinates.
    axes.imshow(shown, extent=(0, width, height, 0), interpolation="nearest")


def _hide_axes(axes: Axes, facecolor: str = "#0b0b0f") -> None:
    axes.set_facecolor(facecolor)
    axes.xaxis.set_major_locator(NullLocator())
    axes.yaxis.set_major_locator(NullLocator())
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_overview(axes: Axes, maps: AttentionMaps, image: np.ndarray) -> None:
    height, width = image.shape[:2]
    _place_image(axes, image)
    _hide_axes(axes, "white")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_anchor("N")
    for x, y, w, h, line in _outlines(maps):
        box = Rectangle((x, y), w, h, fill=False, ec=_QUERY, lw=line)
        box.set_path_effects([withStroke(linewidth=line + 1.4, foreground="black")])
        axes.add_patch(box)


def _outlines(maps: AttentionMaps) -> list[tuple[float, float, float, float, float]]:
    """Return x, y, width, height and line width of the window of a pixel and of the pixel."""
    (row, column), (height, width) = maps.pixel, maps.cell
    reach = maps.kernel_size // 2
    top, left, rows, columns = row - reach, column - reach, maps.kernel_size, maps.kernel_size
    if maps.is_block:
        side = reach + 1
        top, left = row // side * side, column // side * side
        rows = columns = side
    bottom, right = min(top + rows, maps.map_size[0]), min(left + columns, maps.map_size[1])
    top, left = max(top, 0), max(left, 0)
    window = (left * width, top * height, (right - left) * width, (bottom - top) * height, 0.9)
    return [window, (column * width, row * height, width, height, 1.4)]


def _draw_window(
    axes: Axes,
    maps: AttentionMaps,
    head: int,
    image: np.ndarray,
    view: tuple[float, float, float],
    norm: PowerNorm,
) -> None:
    _place_image(axes, image, _LIGHT)
    _hide_axes(axes)
    left, top, side = view
    axes.set_xlim(left, left + side)
    axes.set_ylim(top + side, top)
    (row, column), (height, width) = maps.pixel, maps.cell
    reach = maps.kernel_size // 2
    weights = maps.weights[head].numpy()
    for (i, j), weight in np.ndenumerate(weights):
        y, x = row + i - reach, column + j - reach
        if not (0 <= y < maps.map_size[0] and 0 <= x < maps.map_size[1]):
            continue
        if maps.is_block and weight == 0:
            continue
        share = float(norm(weight))
        axes.add_patch(
            Rectangle(
                (x * width, y * height),
                width,
                height,
                facecolor=(*_HEAT(share)[:3], _COVER + (0.94 - _COVER) * min(1, 1.6 * share)),
                edgecolor=(1, 1, 1, 0.22),
                linewidth=0.35,
            )
        )
    query = Rectangle((column * width, row * height), width, height, fill=False, ec=_QUERY, lw=1.3)
    query.set_path_effects([withStroke(linewidth=2.3, foreground="black")])
    axes.add_patch(query)
    axes.set_title(f"Head {head}", fontsize=_TITLE_SIZE, color=_INK, pad=3)


def _draw_mean(
    axes: Axes, maps: AttentionMaps, head: int, norm: PowerNorm, *, labelled: bool
) -> None:
    reach = maps.kernel_size // 2
    edge = reach + 0.5
    axes.imshow(
        maps.mean[head].numpy(),
        cmap=_HEAT,
        norm=norm,
        extent=(-edge, edge, edge, -edge),
        interpolation="nearest",
    )
    lines = np.arange(-reach + 0.5, reach)
    axes.hlines(lines, -edge, edge, color="white", alpha=0.12, lw=0.35)
    axes.vlines(lines, -edge, edge, color="white", alpha=0.12, lw=0.35)
    axes.add_patch(Rectangle((-0.5, -0.5), 1, 1, fill=False, ec=_QUERY, lw=1.3))
    ticks = FixedLocator([-reach, 0, reach] if reach else [0])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticks)
        axis.set_major_formatter(FuncFormatter(_signed))
    axes.tick_params(labelsize=_FONT_SIZE, length=2, width=0.5, pad=1.5, colors=_FAINT)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if labelled:
        axes.set_ylabel("row offset", fontsize=_FONT_SIZE, color=_FAINT, labelpad=0)
        axes.set_xlabel("column offset", fontsize=_FONT_SIZE, color=_FAINT, labelpad=1)
    else:
        axes.tick_params(labelleft=False)


def _signed(value: float, _: object = None) -> str:
    return f"{value:+.0f}".replace("-", "\N{MINUS SIGN}") if value else "0"


def _draw_scale(figure: Figure, layout: _Layout, norm: PowerNorm, maps: AttentionMaps) -> None:
    left, top, width, height = layout.overview()
    bar = layout.axes(figure, left, top + height + 0.32, width, _BAR)
    colours = figure.colorbar(
        ScalarMappable(norm=norm, cmap=_HEAT), cax=bar, orientation="horizontal"
    )
    colours.outline.set_visible(False)
    colours.set_ticks([norm.vmax * share**2 for share in (0, 0.25, 0.5, 0.75, 1)])
    colours.ax.xaxis.set_major_formatter(FuncFormatter(_percent))
    colours.ax.tick_params(labelsize=_FONT_SIZE, length=2, width=0.5, pad=1.5, colors=_FAINT)
    ends = colours.ax.get_xticklabels()
    ends[0].set_ha("left")
    ends[-1].set_ha("right")
    bar.set_title("Weight", fontsize=_TITLE_SIZE, color=_INK, pad=3, loc="left")
    across, down = layout.size
    figure.text(
        left / across,
        1 - (top + height + 0.72) / down,
        _caption(maps),
        fontsize=_TITLE_SIZE - 0.5,
        color=_FAINT,
        va="top",
        linespacing=1.35,
    )


def _percent(value: float, _: object = None) -> str:
    return f"{value:.1%}" if 0 < value < 0.0095 else f"{value:.0%}"


def _draw_mixing(figure: Figure, layout: _Layout, maps: AttentionMaps) -> None:
    top = layout.mixing_top + _TITLE
    for index, mixture in enumerate(maps.mixing.numpy()):
        left = layout.left + index * (_PANEL + _GAP)
        axes = layout.axes(figure, left, top, _PANEL, _PANEL)
        _hide_axes(axes)
        axes.imshow(mixture, cmap="Greys_r", vmin=0, vmax=1)
        for (row, column), share in np.ndenumerate(mixture):
            colour = "black" if share > 0.5 else "white"
            text = {"fontsize": _FONT_SIZE - 0.5, "ha": "center", "va": "center"}
            axes.text(column, row, f"{share:.0%}", color=colour, **text)
        axes.set_title(f"Value matrix {index}", fontsize=_TITLE_SIZE, color=_INK, pad=3)

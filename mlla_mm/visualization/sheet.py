# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Sheets of pictures with their labels, a row of panels for each picture."""

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import List, Optional, Set, Tuple, Union

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from ..utils.files import write_whole

Color = Tuple[float, float, float]

_PANEL = 2.1  # inches, width and height
_FONT_SIZE = 9  # points
_SAMPLES_PER_ROW = 2
_MASK_ALPHA = 0.45
_CLASS_ALPHA = 0.8


def spread(total: int, num: int) -> np.ndarray:
    """Positions of at most ``num`` samples, spread over ``total``."""
    return np.linspace(0, total - 1, min(total, num)).astype(int)


def new_sheet(
    num_samples: int, columns: Sequence[str], title: str = ''
) -> Tuple[Figure, np.ndarray]:
    """Begin a sheet with a panel for each sample and column.

    Args:
        num_samples (int): Number of samples.
        columns (Sequence[str]): What the panels of a sample show, from left to right.
        title (str): Title of the sheet. Defaults to ''.

    Returns:
        tuple[Figure, np.ndarray]: Matplotlib's figure, and its axes (num_samples,
        len(columns)).
    """
    per_row = min(num_samples, _SAMPLES_PER_ROW)
    rows = math.ceil(num_samples / per_row)
    figure = Figure(
        figsize=(
            _PANEL * len(columns) * per_row,
            _PANEL * rows + (0.7 if title else 0.4),
        ),
        dpi=150,
        layout='constrained',
    )
    if title:
        figure.suptitle(title, fontsize=12)
    # Samples are further apart than the panels of one.
    groups = figure.subfigures(1, per_row, squeeze=False, wspace=0.02)[0]
    blocks = [group.subplots(rows, len(columns), squeeze=False) for group in groups]
    axes = np.stack(blocks, axis=1).reshape(-1, len(columns))
    for ax in axes.flat:
        ax.axis('off')
    for ax, column in zip(axes[:per_row].flat, list(columns) * per_row):
        ax.set_title(column, fontsize=10)
    return figure, axes[:num_samples]


def show(ax: Axes, image: np.ndarray) -> None:
    """Show a picture (H, W, 3), a unit of the axes for each of its pixels."""
    height, width = image.shape[:2]
    ax.imshow(image, extent=(0, width, height, 0))
    ax.autoscale(False)


def draw_instances(
    ax: Axes,
    boxes: Sequence[Sequence[float]],
    texts: Sequence[str],
    colors: Sequence[Color],
    masks: Optional[Sequence[np.ndarray]] = None,
) -> None:
    """Draw labelled boxes and masks on a picture.

    Args:
        ax (Axes): Where :func:`show` showed the picture.
        boxes (Sequence): (n, 4), as x1, y1, x2, y2 in pixels.
        texts (Sequence[str]): A label for each box. :func:`save_sheet` places it.
        colors (Sequence[tuple]): A colour for each box, RGB from 0 to 1.
        masks (Sequence[np.ndarray], optional): (n, H, W), bool. Defaults to None.
    """
    for i, ((x1, y1, x2, y2), text, color) in enumerate(zip(boxes, texts, colors)):
        if masks is not None and masks[i].any():
            _draw_mask(ax, masks[i], color)
        ax.add_patch(
            Rectangle(
                (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.5
            )
        )
        ax.text(
            x1,
            y1,
            text,
            fontsize=_FONT_SIZE,
            color=_readable_on(color),
            bbox=dict(boxstyle='square,pad=0.1', facecolor=color, edgecolor='none'),
            clip_on=True,
            in_layout=False,
        )


def draw_classes(ax: Axes, labels: np.ndarray, metainfo: dict) -> Set[int]:
    """Draw the class of every pixel over a picture.

    Args:
        ax (Axes): Where :func:`show` showed the picture.
        labels (np.ndarray): Classes (H, W). Pixels of other values stay as they are.
        metainfo (dict): The data set's, with classes and palette.

    Returns:
        set[int]: The classes drawn, for :func:`add_legend`.
    """
    height, width = labels.shape
    colors = [(*color, _CLASS_ALPHA) for color in class_colors(metainfo)]
    known = (labels >= 0) & (labels < len(metainfo['classes']))
    ax.imshow(
        np.array([*colors, (0, 0, 0, 0)])[np.where(known, labels, -1)],
        extent=(0, width, height, 0),
        interpolation='nearest',
    )
    return set(labels[known].tolist())


def add_legend(figure: Figure, metainfo: dict, classes: Iterable[int]) -> None:
    """Name the colours of these classes, below the pictures."""
    colors = class_colors(metainfo)
    patches = [
        Patch(facecolor=colors[i], edgecolor='black', label=metainfo['classes'][i])
        for i in sorted(classes)
    ]
    rows, available = 1, figure.bbox.width
    while True:
        legend = figure.legend(
            handles=patches,
            loc='outside lower center',
            ncols=math.ceil(len(patches) / rows),
            frameon=False,
        )
        extent = legend.get_window_extent()
        if extent.width <= available or rows >= len(patches):
            break
        legend.remove()
        rows = max(rows + 1, int(rows * extent.width / available))
    figure.set_figheight(figure.get_figheight() + extent.height / figure.dpi)


def save_sheet(figure: Figure, out: Union[str, Path]) -> None:
    """Place the labels of boxes, and write the sheet.

    Args:
        figure (Figure): From :func:`new_sheet`.
        out (str | Path): Picture file to write.
    """
    figure.draw_without_rendering()  # places the panels
    for ax in figure.axes:
        placed: List[Bbox] = []
        for box, text in zip(ax.patches, ax.texts):
            placed.append(_place(ax, box, text, placed))
    save_figure(figure, out)


def save_figure(
    figure: Figure, out: Union[str, Path], dpi: Union[float, str] = 'figure'
) -> None:
    """Write a figure to a file. A link of that name is replaced, not followed.

    Args:
        figure (Figure): The figure.
        out (str | Path): Picture file to write. Its suffix names the format.
        dpi (float | str): Pixels of an inch. Defaults to 'figure': the figure's own.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(out).suffix[1:] or None, dpi=dpi)
    write_whole(out, picture.getbuffer())


def class_colors(metainfo: dict) -> List[Color]:
    """Colours of a data set's classes, RGB from 0 to 1: its palette, if it has one."""
    number = len(metainfo['classes'])
    colors = np.array(metainfo.get('palette') or ()) / 255
    if len(colors) < number:
        colors = colormaps['hsv'](np.linspace(0, 1, number, endpoint=False))
    return [(r, g, b) for r, g, b in colors[:, :3].tolist()]


def _draw_mask(ax: Axes, mask: np.ndarray, color: Color) -> None:
    height, width = mask.shape
    # The margin closes the outlines of masks that reach the edge of the picture.
    grid = np.arange(-0.5, width + 1), np.arange(-0.5, height + 1), np.pad(mask, 1)
    ax.contourf(*grid, levels=(0.5, 1), colors=[color], alpha=_MASK_ALPHA)
    ax.contour(*grid, levels=(0.5,), colors=[color], linewidths=1)


def _readable_on(color: Color) -> str:
    """Black or white, whichever has more contrast by the rule of WCAG 2."""
    luminance = np.dot(np.power(color, 2.2), (0.2126, 0.7152, 0.0722))
    return 'black' if luminance > 0.18 else 'white'


def _place(ax: Axes, box: Patch, text: Text, placed: Sequence[Bbox]) -> Bbox:
    """Move a label to a corner of its box, in the picture and apart from others."""
    space = ax.get_window_extent()
    anchor = ax.transData.transform(text.get_position())
    background = text.get_bbox_patch()
    assert background is not None  # draw_instances gives each label one
    padded = background.get_window_extent()
    corners = box.get_window_extent()
    width, height = padded.size
    places = []
    # Places outside the box come first, because there the label hides no object.
    for y in (corners.y1, corners.y0 - height, corners.y1 - height, corners.y0):
        for x in (corners.x0, corners.x1 - width):
            x = np.clip(x, space.x0, max(space.x0, space.x1 - width))
            y = np.clip(y, space.y0, max(space.y0, space.y1 - height))
            places.append(Bbox.from_bounds(x, y, width, height))

    def hidden(place: Bbox) -> float:
        common = (Bbox.intersection(place, other) for other in placed)
        return sum(box.width * box.height for box in common if box is not None)

    best = min(places, key=hidden)
    moved = ax.transData.inverted().transform(anchor + best.min - padded.min)
    text.set_position((moved[0], moved[1]))
    return best

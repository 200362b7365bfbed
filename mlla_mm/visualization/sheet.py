# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Sheets of pictures with their labels, a row of panels for each picture."""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, List, Optional, Set, Tuple, Union

import numpy as np

from ..checkpoints.reader import load_pickle_file
from ..utils.files import write_whole
from ..utils.text import describe_error, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

Color = Tuple[float, float, float]

_PANEL = 2.1  # inches, width and height
_FONT_SIZE = 9  # points
_SAMPLES_PER_ROW = 2
_MASK_ALPHA = 0.45
_CLASS_ALPHA = 0.8


def spread(total: int, num: int) -> np.ndarray:
    """Positions of at most ``num`` samples, spread over ``total``."""
    return np.linspace(0, total - 1, min(total, num)).astype(int)


def load_predictions(path: Union[str, Path], dataset: Any) -> List[dict]:
    """Read what `tools/test.py --out` wrote, running none of the code it may carry.

    Args:
        path (str | Path): The pickle file.
        dataset (BaseDataset): What was tested on.

    Returns:
        list[dict]: The prediction for each image.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, or holds more than data.
        ValueError: If it holds no predictions for images of the data set.
    """
    results = load_pickle_file(path)
    infos = (dataset.get_data_info(i) for i in range(len(dataset)))
    # No others are opened, whatever the file names.
    images = {info['img_path'] for info in infos}
    found = results if isinstance(results, list) else [results]
    for result in found or [None]:
        image = result.get('img_path') if isinstance(result, dict) else result
        if not isinstance(image, str) or image not in images:
            raise ValueError(
                f'{printable(path)} holds no predictions for the test data of the '
                f'config: instead of an image of these it has {printable(image)}. Test '
                f'again with --out {printable(path)}'
            )
    return found


@contextmanager
def errors_of_predictions(path: Union[str, Path]) -> Iterator[None]:
    """Turn what damaged predictions raise into one error that names their file.

    Raises:
        ValueError: If something is missing, or of another type.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f'{printable(path)} holds no predictions of the config '
            f'({describe_error(error)}). Test again with --out {printable(path)}'
        ) from error


def new_sheet(
    num_samples: int, columns: Sequence[str], title: str = ''
) -> Tuple['Figure', np.ndarray]:
    """Begin a sheet with a panel for each sample and column.

    Args:
        num_samples (int): Number of samples.
        columns (Sequence[str]): What the panels of a sample show, from left to right.
        title (str): Title of the sheet. Defaults to ''.

    Returns:
        tuple[Figure, np.ndarray]: Matplotlib's figure, and its axes (num_samples,
        len(columns)).
    """
    from matplotlib.figure import Figure

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


def show(ax: 'Axes', image: np.ndarray) -> None:
    """Show a picture (H, W, 3), a unit of the axes for each of its pixels."""
    height, width = image.shape[:2]
    ax.imshow(image, extent=(0, width, height, 0))
    ax.autoscale(False)


def draw_instances(
    ax: 'Axes',
    boxes: Sequence[Sequence[float]],
    texts: Sequence[str],
    colors: Sequence[Color],
    masks: Optional[Sequence[np.ndarray]] = None,
) -> None:
    """Draw labelled boxes and masks on a shown picture.

    Args:
        ax (Axes): Where :func:`show` showed the picture.
        boxes (Sequence): (n, 4), as x1, y1, x2, y2 in pixels.
        texts (Sequence[str]): A label for each box; :func:`save_sheet` finds its place.
        colors (Sequence[tuple]): A colour for each box, RGB from 0 to 1.
        masks (Sequence[np.ndarray], optional): (n, H, W), bool. Defaults to None.
    """
    from matplotlib.patches import Rectangle

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


def draw_classes(ax: 'Axes', labels: np.ndarray, metainfo: dict) -> Set[int]:
    """Draw the class of every pixel over a shown picture.

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


def add_legend(figure: 'Figure', metainfo: dict, classes: Iterable[int]) -> None:
    """Name the colours of these classes, below the pictures."""
    from matplotlib.patches import Patch

    colors = class_colors(metainfo)
    patches = [
        Patch(facecolor=colors[i], edgecolor='black', label=metainfo['classes'][i])
        for i in sorted(classes)
    ]
    rows, available = 1, figure.get_figwidth()
    while True:
        legend = figure.legend(
            handles=patches,
            loc='outside lower center',
            ncols=math.ceil(len(patches) / rows),
            frameon=False,
        )
        width, height = legend.get_window_extent().size / figure.dpi
        if width <= available or rows >= len(patches):
            break
        legend.remove()
        rows = max(rows + 1, int(rows * width / available))
    figure.set_figheight(figure.get_figheight() + height)


def save_sheet(figure: 'Figure', out: Union[str, Path]) -> None:
    """Find places for the labels of boxes, and write the sheet.

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
    figure: 'Figure', out: Union[str, Path], dpi: Union[float, str] = 'figure'
) -> None:
    """Write a figure, in the place of what is there: a link is not followed.

    Args:
        figure (Figure): The figure.
        out (str | Path): Picture file to write, of the format that its suffix names.
        dpi (float | str): Pixels of an inch. Defaults to 'figure': those of the figure.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(out).suffix[1:] or None, dpi=dpi)
    write_whole(out, picture.getbuffer())


def class_colors(metainfo: dict) -> List[Color]:
    """Colours of a data set's classes, RGB from 0 to 1: its own, if it has any."""
    from matplotlib import colormaps

    number = len(metainfo['classes'])
    palette = metainfo.get('palette') or ()
    if len(palette) >= number:
        return [tuple(channel / 255 for channel in color) for color in palette]
    hues = np.linspace(0, 1, number, endpoint=False)
    return [tuple(color) for color in colormaps['hsv'](hues)[:, :3]]


def _draw_mask(ax: 'Axes', mask: np.ndarray, color: Color) -> None:
    height, width = mask.shape
    # A margin closes the outlines of masks that reach the picture's edge.
    grid = np.arange(-0.5, width + 1), np.arange(-0.5, height + 1), np.pad(mask, 1)
    ax.contourf(*grid, levels=(0.5, 1), colors=[color], alpha=_MASK_ALPHA)
    ax.contour(*grid, levels=(0.5,), colors=[color], linewidths=1)


def _readable_on(color: Color) -> str:
    """Black or white, whichever has more contrast by the rule of WCAG 2."""
    luminance = np.dot(np.power(color, 2.2), (0.2126, 0.7152, 0.0722))
    return 'black' if luminance > 0.18 else 'white'


def _place(
    ax: 'Axes', box: 'Rectangle', text: 'Text', placed: Sequence['Bbox']
) -> 'Bbox':
    """Put a label at a corner of its box, in the picture and apart from others."""
    from matplotlib.transforms import Bbox

    space = ax.get_window_extent()
    anchor = ax.transData.transform(text.get_position())
    padded = text.get_bbox_patch().get_window_extent()
    corners = box.get_window_extent()
    width, height = padded.size
    places = []
    # Outside the box first: the label hides none of the object there.
    for y in (corners.y1, corners.y0 - height, corners.y1 - height, corners.y0):
        for x in (corners.x0, corners.x1 - width):
            x = np.clip(x, space.x0, max(space.x0, space.x1 - width))
            y = np.clip(y, space.y0, max(space.y0, space.y1 - height))
            places.append(Bbox.from_bounds(x, y, width, height))
    best = min(places, key=lambda place: sum(_overlap(place, p) for p in placed))
    moved = anchor + best.min - padded.min
    text.set_position(ax.transData.inverted().transform(moved))
    return best


def _overlap(a: 'Bbox', b: 'Bbox') -> float:
    from matplotlib.transforms import Bbox

    common = Bbox.intersection(a, b)
    return 0.0 if common is None else common.width * common.height

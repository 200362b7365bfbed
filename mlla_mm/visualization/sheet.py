# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Sheets of predictions beside ground truth."""

import math
from pathlib import Path
from typing import Sequence, Tuple, Union

import cv2
import numpy as np

# Labels drawn on a smaller picture are not legible.
_MIN_SIDE = 256


def save_sheet(
    pairs: Sequence[Tuple[np.ndarray, np.ndarray]],
    titles: Tuple[str, str],
    out: Union[str, Path],
    columns: int = 2,
) -> None:
    """Save pairs of pictures, each pair side by side under the two titles.

    Args:
        pairs (Sequence[tuple]): RGB pictures (H, W, 3), uint8.
        titles (tuple[str, str]): Titles of the left and the right pictures.
        out (str | Path): Picture file to write.
        columns (int): Pairs per row. Defaults to 2.
    """
    from matplotlib.figure import Figure

    rows = math.ceil(len(pairs) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.2 * rows), layout='constrained')
    axes = figure.subplots(rows, 2 * columns, squeeze=False).reshape(-1, 2)
    for both in axes:
        for ax in both:
            ax.axis('off')
    for i, (both, pair) in enumerate(zip(axes, pairs)):
        for ax, picture, title in zip(both, pair, titles):
            ax.imshow(picture)
            if i < columns:
                ax.set_title(title, fontsize=9)
    figure.savefig(out, dpi=200)


def enlargement(shape: Tuple[int, int]) -> int:
    """Whole factor by which to enlarge a small picture (H, W) before drawing on it."""
    return max(1, math.ceil(_MIN_SIDE / max(shape)))


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """Enlarge (H, W, 3) by a whole factor."""
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)

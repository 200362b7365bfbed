# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What models do in a race: the images, the batch size, the mode and the dtype."""

import math
import re
from collections.abc import Sequence
from itertools import product
from typing import List, NamedTuple, Optional, Tuple

MODES = ('infer', 'train')
DTYPES = ('float32', 'float16', 'bfloat16')
#: Heights and widths that have a name.
PRESETS = dict(
    classification=(224, 224), detection=(800, 1280), segmentation=(512, 2048)
)
#: Sides of the square images of a sweep.
SWEEP_SIDES = (224, 320, 448, 640, 896, 1120)
_STRIDE = 4


class Case(NamedTuple):
    """What all models do in a race.

    Attributes:
        task (str): 'classification' takes images to logits of 1000 classes. Any other
            name takes images to the feature maps of all four stages.
        shape (tuple[int, int]): Height and width of the images.
        batch_size (int): Images per call.
        mode (str): 'infer' or 'train'. 'train' is a training step without loss and
            optimiser: forward, backward from fixed gradients of the outputs, gradients
            set to None.
        dtype (str): 'float32', or 'float16' or 'bfloat16' for autocast.
    """

    task: str
    shape: Tuple[int, int]
    batch_size: int
    mode: str = 'infer'
    dtype: str = 'float32'

    def __str__(self) -> str:
        height, width = self.shape
        return (
            f'{self.task} {height}x{width}, batch {self.batch_size}, {self.mode}, '
            f'{self.dtype}'
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of an image in the first stage."""
        return math.prod(-(-side // _STRIDE) for side in self.shape)


def parse_shape(text: str) -> Tuple[str, Tuple[int, int]]:
    """Task and size of images, from the name of a preset or from HEIGHTxWIDTH.

    Raises:
        ValueError: If the text is neither.
    """
    if text in PRESETS:
        return text, PRESETS[text]
    found = re.fullmatch(r'([1-9]\d*)x([1-9]\d*)', text)
    if not found:
        raise ValueError(
            f'--shape takes {", ".join(PRESETS)} or HEIGHTxWIDTH, got {text!r}.'
        )
    return 'backbone', (int(found[1]), int(found[2]))


def make_cases(
    shapes: Sequence[str],
    batch_sizes: Optional[Sequence[int]] = None,
    modes: Sequence[str] = MODES[:1],
    dtypes: Sequence[str] = DTYPES[:1],
) -> List[Case]:
    """All combinations of shapes, modes and dtypes.

    Args:
        shapes (Sequence[str]): See :func:`parse_shape`.
        batch_sizes (Sequence[int], optional): One for all shapes, or one for each.
            Defaults to None: 1.
        modes (Sequence[str]): Of :data:`MODES`. Defaults to inference.
        dtypes (Sequence[str]): Of :data:`DTYPES`. Defaults to float32.

    Raises:
        ValueError: If a shape is neither a preset nor HEIGHTxWIDTH, if a batch size is
            not positive, or if there are not as many batch sizes as shapes.
    """
    batch_sizes = list(batch_sizes or [1])
    if len(batch_sizes) == 1:
        batch_sizes *= len(shapes)
    if len(batch_sizes) != len(shapes) or min(batch_sizes) < 1:
        raise ValueError(
            f'--batch-size takes one positive number for all {len(shapes)} shapes, or '
            f'one for each, got {" ".join(map(str, batch_sizes))}.'
        )
    return [
        Case(*parse_shape(shape), batch_size, mode, dtype)
        for (shape, batch_size), mode, dtype in product(
            zip(shapes, batch_sizes), modes, dtypes
        )
    ]


def make_sweep(
    sides: Sequence[int],
    batch_size: int = 1,
    mode: str = MODES[0],
    dtype: str = DTYPES[0],
) -> List[Case]:
    """Cases of backbones on square images of several sizes, from small to large.

    Raises:
        ValueError: If there are fewer than two sizes, through which no slope can be
            fitted, or if a size is not positive.
    """
    if len(set(sides)) < 2 or min(sides) < 1:
        raise ValueError(
            '--sweep takes two or more different positive sides, got '
            f'{" ".join(map(str, sides))}.'
        )
    shapes = [f'{side}x{side}' for side in sorted(set(sides))]
    return make_cases(shapes, [batch_size], [mode], [dtype])

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Random erasing, applied where the images are normalised."""

import torch
from torch import Tensor


def erase(
    image: Tensor, top: int, left: int, height: int, width: int, seed: int
) -> None:
    """Fill a box of an image with noise, in place.

    Every value is drawn from the standard normal distribution. The noise depends on the
    seed, on the size of the box and on the kind of device.

    Args:
        image (Tensor): A normalised image (C, H, W), of floating point.
        top (int): First row of the box.
        left (int): First column of the box.
        height (int): Number of rows.
        width (int): Number of columns.
        seed (int): Seed of the noise, in [0, 2^63).
    """
    generator = torch.Generator(image.device).manual_seed(seed)
    box = image[:, top : top + height, left : left + width]
    # Not in place: on a GPU the order of values in a view is not documented.
    box.copy_(torch.empty(box.shape, device=box.device).normal_(generator=generator))

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""mmpretrain's transforms, faster. They have mmpretrain's names and random draws.

Importing this module needs mmpretrain.
"""

from typing import Any, Tuple

import mmcv.transforms as mmcv_transforms
import numpy as np
import torch
import torch.nn.functional as F
from mmpretrain.datasets import transforms

from .images import FlipInMemory, PackInPlanes


class _ResizedByPyTorch:
    """Mixin for a transform that resizes: PyTorch does, with antialiasing."""

    interpolation: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, backend='torch', **kwargs)  # type: ignore[call-arg]
        if self.interpolation not in ('bilinear', 'bicubic'):
            raise ValueError(
                f"The interpolation of {type(self).__name__} must be 'bilinear' or "
                f"'bicubic', got '{self.interpolation}'. mmpretrain's transform has "
                'others.'
            )

    def resize(self, image: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
        """Resize an image (H, W[, C]) to a size (height, width)."""
        if image.dtype != np.uint8:
            raise TypeError(
                f'{type(self).__name__} takes images of type uint8, got '
                f"{image.dtype}. Convert them behind it, or use mmpretrain's transform."
            )
        # PyTorch takes no negative strides, and warns of arrays that are read-only.
        image = np.require(image, requirements=['C', 'W'])
        # A view in channels-last layout, for which PyTorch has fast kernels.
        pixels = torch.from_numpy(image.reshape(1, *image.shape[:2], -1))
        batch = pixels.permute(0, 3, 1, 2)
        mode = self.interpolation
        resized = F.interpolate(batch, size, mode=mode, antialias=True)
        resized = resized.permute(0, 2, 3, 1).contiguous()
        return resized.numpy().reshape(*size, *image.shape[2:])


class RandomResizedCrop(_ResizedByPyTorch, transforms.RandomResizedCrop):
    """mmpretrain's random resized crop, resized by PyTorch with antialiasing.

    The boxes are those that mmpretrain draws. The pixels are those of
    ``backend='pillow'`` before Pillow 13, but for a difference of 1, rarely 2, in about
    1 % of the values. From 13 on, Pillow may resize columns first, which rounds others.

    Args:
        *args: Arguments of mmpretrain's ``RandomResizedCrop``.
        **kwargs: Further ones, without ``backend``. The ``interpolation`` must be
            'bilinear' or 'bicubic'. Defaults to 'bilinear'.

    Raises:
        ValueError: If the interpolation is another one.
        TypeError: When an image is transformed, if it is not of type uint8.
    """

    def transform(self, results: dict) -> dict:
        """Crop and resize ``img`` (H, W[, C]), and set ``img_shape``."""
        image = results['img']
        top, left, height, width = self.rand_crop_params(image)
        crop = image[top : top + height, left : left + width]
        results['img'] = self.resize(crop, tuple(self.scale))
        results['img_shape'] = results['img'].shape
        return results


class ResizeEdge(_ResizedByPyTorch, transforms.ResizeEdge):
    """mmpretrain's resizing of an edge, done by PyTorch with antialiasing.

    Its pixels are to Pillow's as those of :class:`RandomResizedCrop`.

    Args:
        *args: Arguments of mmpretrain's ``ResizeEdge``.
        **kwargs: Further ones, without ``backend``. The ``interpolation`` must be
            'bilinear' or 'bicubic'. Defaults to 'bilinear'.

    Raises:
        ValueError: If the interpolation is another one.
        TypeError: When an image is transformed, if it is not of type uint8.
    """

    def _resize_img(self, results: dict) -> None:
        old_height, old_width = results['img'].shape[:2]
        width, height = results['scale']
        results['img'] = self.resize(results['img'], (height, width))
        results['img_shape'] = (height, width)
        results['scale_factor'] = (width / old_width, height / old_height)


class RandomFlip(FlipInMemory, mmcv_transforms.RandomFlip):
    """mmcv's transform, with a contiguous image.

    Args:
        *args: Arguments of mmcv's ``RandomFlip``.
        **kwargs: Further ones.
    """


class PackInputs(PackInPlanes, transforms.PackInputs):
    """mmpretrain's transform, with OpenCV's transposition of images.

    Args:
        *args: Arguments of mmpretrain's ``PackInputs``.
        **kwargs: Further ones.
    """

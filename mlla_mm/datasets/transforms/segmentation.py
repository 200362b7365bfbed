# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""mmseg's transforms, faster. They have mmseg's names and arguments.

Samples and random draws stay the same, bit by bit. Importing this module needs mmseg.
"""

from typing import Tuple

import cv2
import mmcv
import numpy as np
from mmcv.transforms.utils import cache_randomness
from mmseg.datasets import transforms

from .images import FlipInMemory, PackInPlanes

_TRIES = 10
# OpenCV counts in float32, which has all whole numbers up to here.
_MAX_COUNT = 2**24


def _count(labels: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """The values of an array in rising order, and the number of each."""
    if labels.dtype != np.uint8 or labels.ndim != 2 or labels.size > _MAX_COUNT:
        return np.unique(labels, return_counts=True)
    counts = cv2.calcHist([labels], [0], None, [256], [0, 256])[:, 0].astype(np.int64)
    values = np.flatnonzero(counts)
    return values, counts[values]


class RandomCrop(transforms.RandomCrop):
    """mmseg's transform, which counts labels without sorting them.

    Args:
        *args: Arguments of mmseg's ``RandomCrop``.
        **kwargs: Further ones.
    """

    @cache_randomness
    def crop_bbox(self, results: dict) -> Tuple[int, int, int, int]:
        """Draw a box, up to ten times more while one class has too large a part of it.

        Args:
            results (dict): With ``img``, an array (H, W, C), and ``gt_seg_map``, one of
                shape (H, W).

        Returns:
            tuple[int, int, int, int]: First row, end of the rows, first column, end of
            the columns, in pixels.
        """
        height, width = self.crop_size
        image_height, image_width = results['img'].shape[:2]
        for tries_left in reversed(range(_TRIES + 1)):
            top = np.random.randint(0, max(image_height - height, 0) + 1)
            left = np.random.randint(0, max(image_width - width, 0) + 1)
            box = top, top + height, left, left + width
            if self.cat_max_ratio >= 1 or not tries_left:
                break
            labels, counts = _count(self.crop(results['gt_seg_map'], box))
            counts = counts[labels != self.ignore_index]
            if len(counts) > 1 and counts.max() / counts.sum() < self.cat_max_ratio:
                break
        return box


class RandomFlip(FlipInMemory, transforms.RandomFlip):
    """mmseg's transform, with a contiguous image.

    Args:
        *args: Arguments of mmseg's ``RandomFlip``.
        **kwargs: Further ones.
    """


class PhotoMetricDistortion(transforms.PhotoMetricDistortion):
    """mmseg's transform, which computes each of the 256 values of a pixel once.

    Args:
        *args: Arguments of mmseg's ``PhotoMetricDistortion``.
        **kwargs: Further ones.
    """

    def convert(self, img: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
        """Round ``alpha * img + beta`` down, between 0 and 255.

        Args:
            img (ndarray): Image of any shape.
            alpha (float): Factor. Defaults to 1.
            beta (float): Summand. Defaults to 0.

        Returns:
            ndarray: Image of the same shape in uint8.
        """
        if img.dtype != np.uint8:
            return super().convert(img, alpha, beta)
        table = super().convert(np.arange(256, dtype=np.uint8), alpha, beta)
        return cv2.LUT(img, table).reshape(img.shape)

    def hue(self, img: np.ndarray) -> np.ndarray:
        """Add a random number to the hue, or not.

        Args:
            img (ndarray): Image (H, W, 3) in BGR.

        Returns:
            ndarray: Image of the same shape.
        """
        if img.dtype != np.uint8:
            return super().hue(img)
        if np.random.randint(2):
            img = mmcv.bgr2hsv(img)
            delta = np.random.randint(-self.hue_delta, self.hue_delta)
            table = ((np.arange(256) + delta) % 180).astype(np.uint8)
            img[..., 0] = cv2.LUT(img[..., 0], table)
            img = mmcv.hsv2bgr(img)
        return img


class PackSegInputs(PackInPlanes, transforms.PackSegInputs):
    """mmseg's transform, with OpenCV's transposition of images.

    Args:
        *args: Arguments of mmseg's ``PackSegInputs``.
        **kwargs: Further ones.
    """

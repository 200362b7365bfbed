# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Transforms that let OpenCV move the pixels of an image, for all toolboxes.

NumPy flips without moving anything, and each later step then reads the pixels
backwards, one by one. PyTorch and NumPy are as slow in separating the channels.
"""

from typing import Any, Dict

import cv2
import numpy as np

_FLIP_CODES = dict(horizontal=1, vertical=0, diagonal=-1)


def _is_for_opencv(image: Any) -> bool:
    """Whether OpenCV can move the pixels of an image, and keeps its axes."""
    return (
        image is not None
        and image.dtype in (np.uint8, np.float32)
        and image.ndim == 3
        and 2 <= image.shape[2] <= 4
        # OpenCV would first copy what is read backwards, as slowly as NumPy.
        and min(image.strides) > 0
    )


class FlipInMemory:
    """Mixin for a ``RandomFlip``: a flipped image lies in memory as it is read.

    Values and random draws stay the same.
    """

    def transform(self, results: dict) -> dict:
        """Flip what is in ``results``, or not.

        Args:
            results (dict): With ``img``, an array (H, W, C) or (H, W).

        Returns:
            dict: The same, with ``img`` as a contiguous array.
        """
        image: Any = results.get('img')
        results = super().transform(results)  # type: ignore[misc]
        if results['flip'] and _is_for_opencv(image):
            results['img'] = cv2.flip(image, _FLIP_CODES[results['flip_direction']])
        return results


class PackInPlanes:
    """Mixin for a transform that packs ``img`` as a tensor (C, H, W).

    Values stay the same.
    """

    def transform(self, results: dict) -> Dict[str, Any]:
        """Pack what is in ``results``.

        Args:
            results (dict): With ``img``, an array (H, W, C) or (H, W), or without.

        Returns:
            dict: ``inputs`` and ``data_samples``.
        """
        image: Any = results.get('img')
        if _is_for_opencv(image):
            height, width, channels = image.shape
            planes = np.empty((channels, height, width), image.dtype)
            pairs = [x for channel in range(channels) for x in (channel, channel)]
            cv2.mixChannels([image], list(planes), pairs)
            # The toolbox transposes them back.
            results['img'] = planes.transpose(1, 2, 0)
        return super().transform(results)  # type: ignore[misc]

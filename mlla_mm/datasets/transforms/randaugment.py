# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""mmpretrain's RandAugment, with operations that look values up or that OpenCV has.

They have mmpretrain's names, arguments and random draws. Importing this module needs
mmpretrain.
"""

from math import ceil, floor
from typing import Any, Iterator, Tuple, Union

import cv2
import numpy as np
from mmpretrain.datasets import transforms
from mmpretrain.registry import TRANSFORMS

_LEVELS = np.arange(256)
# OpenCV rounds, and Pillow cuts off. A little less than 0.5, so that whole numbers,
# which are exact in float32 but for a few units in the last place, stay what they are.
_CUT_OFF = -0.5 + 2**-12
# Pillow's ImageFilter.SMOOTH.
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13


class RandAugment(transforms.RandAugment):
    """mmpretrain's RandAugment, with the faster operations of this module.

    Policies are mmpretrain's, with the names of its operations. Those that are slow
    there are replaced: of 'timm_increasing' all but Invert, Rotate, Posterize and
    Shear.

    Args:
        *args: Arguments of mmpretrain's ``RandAugment``.
        **kwargs: Further ones.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for i, (policy, operation) in enumerate(zip(self.policies, self.transforms)):
            faster = _FASTER.get(type(operation))
            if faster is not None:
                self.transforms[i] = TRANSFORMS.build(dict(policy, type=faster))


class _Operation(transforms.BaseAugTransform):
    """Operation on BGR images of type uint8; others are left to mmpretrain's class."""

    def transform(self, results: dict) -> dict:
        """Change ``img`` (H, W, 3), or leave it as it is, by chance."""
        image = results['img']
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            return super().transform(results)
        if not self.random_disable():
            results['img'] = self.apply(np.ascontiguousarray(image))
        return results

    def apply(self, image: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def draw(self, value: Union[int, float, None], signed: bool = False) -> float:
        """The strength: a fixed value, or else drawn; then its sign."""
        value = self.random_magnitude() if value is None else value
        return self.random_negative(value) if signed else value


class _TableOperation(_Operation):
    """Operation that maps each value by a table: (256,), or (1, 256, 3) by channel."""

    def apply(self, image: np.ndarray) -> np.ndarray:
        return cv2.LUT(image, self.table(image).astype(np.uint8))

    def table(self, image: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class AutoContrast(_TableOperation, transforms.AutoContrast):
    """mmpretrain's AutoContrast, to the bit, by a table. Same arguments."""

    def table(self, image: np.ndarray) -> np.ndarray:
        tables = []
        for histogram in _histograms(image):
            low, high = np.flatnonzero(histogram)[[0, -1]]
            scale = 255.0 / max(high - low, 1)
            stretched = np.clip(_LEVELS * scale - low * scale, 0, 255)
            tables.append(stretched if low < high else _LEVELS)
        return np.stack(tables, -1)[None]


class Equalize(_TableOperation, transforms.Equalize):
    """mmpretrain's Equalize, to the bit, by a table. Same arguments."""

    def table(self, image: np.ndarray) -> np.ndarray:
        tables = []
        for histogram in _histograms(image):
            total = np.cumsum(histogram)
            # Pillow's step leaves out the greatest value that there is.
            step = (total[-1] - histogram[histogram > 0][-1]) // 255
            below = np.append(0, total[:-1])
            equal = np.minimum((below + step // 2) // max(step, 1), 255)
            tables.append(equal if step else _LEVELS)
        return np.stack(tables, -1)[None]


class Solarize(_TableOperation, transforms.Solarize):
    """mmpretrain's Solarize, to the bit, by a table. Same arguments."""

    def table(self, image: np.ndarray) -> np.ndarray:
        return np.where(_LEVELS < self.draw(self.thr), _LEVELS, 255 - _LEVELS)


class SolarizeAdd(_TableOperation, transforms.SolarizeAdd):
    """mmpretrain's SolarizeAdd, to the bit, by a table. Same arguments."""

    def table(self, image: np.ndarray) -> np.ndarray:
        added = np.minimum(_LEVELS + self.draw(self.magnitude), 255)
        return np.where(_LEVELS < self.thr, added, _LEVELS)


class Contrast(_TableOperation, transforms.Contrast):
    """mmpretrain's Contrast by a table, as Pillow blends. Same arguments."""

    def table(self, image: np.ndarray) -> np.ndarray:
        factor = 1 + self.draw(self.magnitude, signed=True)
        grey = cv2.mean(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY))[0]
        return _blended_levels(int(grey + 0.5), factor)


class Brightness(_TableOperation, transforms.Brightness):
    """mmpretrain's Brightness by a table, as Pillow blends. Same arguments."""

    def table(self, image: np.ndarray) -> np.ndarray:
        return _blended_levels(0, 1 + self.draw(self.magnitude, signed=True))


class ColorTransform(_Operation, transforms.ColorTransform):
    """mmpretrain's ColorTransform, blended as by Pillow. Same arguments."""

    def apply(self, image: np.ndarray) -> np.ndarray:
        factor = 1 + self.draw(self.magnitude, signed=True)
        grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
        return _blend(cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR), image, factor)


class Sharpness(_Operation, transforms.Sharpness):
    """mmpretrain's Sharpness without the outermost pixels, as Pillow's. Same arguments.

    Pillow's filter has no neighbours for them, and leaves them as they are.
    """

    def apply(self, image: np.ndarray) -> np.ndarray:
        factor = 1 + self.draw(self.magnitude, signed=True)
        sharp = _blend(cv2.filter2D(image, -1, _SMOOTH), image, factor)
        sharp[[0, -1]] = image[[0, -1]]
        sharp[:, [0, -1]] = image[:, [0, -1]]
        return sharp


class Translate(_Operation, transforms.Translate):
    """mmpretrain's Translate, with Pillow's kernel and edges if it is bicubic.

    Along one axis, cubic convolution with a = -1 (`Keys, 1981
    <https://doi.org/10.1109/TASSP.1981.1163711>`_), whose samples beyond the edge are
    the edge's. A pixel is filled if its centre comes from outside. Same arguments.
    """

    def transform(self, results: dict) -> dict:
        """Translate ``img`` (H, W, 3), or leave it as it is, by chance."""
        if self.interpolation != 'bicubic':
            return transforms.Translate.transform(self, results)
        return super().transform(results)

    def apply(self, image: np.ndarray) -> np.ndarray:
        vertical = self.direction == 'vertical'
        size = image.shape[0 if vertical else 1]
        # A pixel at i comes from i + offset.
        offset = -self.draw(self.magnitude, signed=True) * size
        first = max(ceil(-offset - 0.5), 0)
        end = min(ceil(size - offset - 0.5), size)
        pad_val = np.broadcast_to(self.pad_val, 3)
        if first >= end:
            return np.full_like(image, pad_val)

        def border(before: int, after: int) -> Tuple[int, int, int, int]:
            return (before, after, 0, 0) if vertical else (0, 0, before, after)

        # From -1 on, because a centre half a pixel before that of pixel 0 is inside.
        image = cv2.copyMakeBorder(image, *border(1, 0), cv2.BORDER_REPLICATE)
        d = offset - floor(offset)
        kernel = np.array(
            [[-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2]]
        )
        shifted = cv2.filter2D(
            image,
            -1,
            kernel.T if vertical else kernel,
            anchor=(0, 1) if vertical else (1, 0),
            delta=_CUT_OFF,
            borderType=cv2.BORDER_REPLICATE,
        )
        kept = slice(first + floor(offset) + 1, end + floor(offset) + 1)
        return cv2.copyMakeBorder(
            shifted[kept] if vertical else shifted[:, kept],
            *border(first, size - end),
            cv2.BORDER_CONSTANT,
            value=pad_val.tolist(),
        )


def _histograms(image: np.ndarray) -> Iterator[np.ndarray]:
    """How often each value occurs, for each channel: (256,)."""
    for channel in range(3):
        counts = cv2.calcHist([image], [channel], None, [256], [0, 256])
        yield counts[:, 0].astype(np.int64)


def _blended_levels(level: int, factor: float) -> np.ndarray:
    """Table of a blend of a level (factor 0) with the image (factor 1), cut off."""
    # In float32, as Pillow.
    blended = level + np.float32(factor) * (_LEVELS - level).astype(np.float32)
    return np.clip(blended, 0, 255)


def _blend(other: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """Blend of another image (factor 0) with an image (factor 1), cut off."""
    return cv2.addWeighted(image, factor, other, 1 - factor, _CUT_OFF)


# By mmpretrain's class.
_FASTER = {
    kind.__bases__[-1]: kind
    for kind in (
        AutoContrast,
        Brightness,
        ColorTransform,
        Contrast,
        Equalize,
        Sharpness,
        Solarize,
        SolarizeAdd,
        Translate,
    )
}

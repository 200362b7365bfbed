# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import math
from typing import Optional, Tuple

import numpy as np
from mmcv.transforms import TRANSFORMS, BaseTransform
from mmcv.transforms.utils import cache_randomness

# A box that does not fit is drawn again, so often.
_ATTEMPTS = 10


@TRANSFORMS.register_module()
class DrawErasing(BaseTransform):
    r"""Draw a box of a packed image that is to be erased.

    The box has :math:`a HW` pixels of an image of H x W and the ratio r of height and
    width, with a uniform in ``area_ratio_range`` and log r uniform in the logarithms of
    ``aspect_range``, as in timm. The model's
    :class:`mlla_mm.models.classifiers.ErasingDataPreprocessor` fills it with noise
    after the normalisation (`Zhong et al., 2017 <https://arxiv.org/abs/1708.04896>`_).
    Another preprocessor does not erase.

    Required keys: ``inputs`` (Tensor (C, H, W)) and ``data_samples``, so it comes
    behind ``PackInputs``. The sample gets ``erasing``: top, left, height and width of
    the box, and the seed of its noise.

    Args:
        prob (float): Probability that an image is erased. Defaults to 0.25.
        area_ratio_range (tuple[float]): Least and greatest a. Defaults to (0.02, 1/3).
        aspect_range (tuple[float]): Least and greatest r. Defaults to (0.3, 1/0.3).

    Raises:
        ValueError: If an argument is out of range, or the image is not packed.
    """

    def __init__(
        self,
        prob: float = 0.25,
        area_ratio_range: Tuple[float, float] = (0.02, 1 / 3),
        aspect_range: Tuple[float, float] = (0.3, 1 / 0.3),
    ) -> None:
        if not 0 <= prob <= 1:
            raise ValueError(f'prob must be in [0, 1], got {prob}.')
        least, greatest = area_ratio_range
        if not 0 < least <= greatest <= 1:
            raise ValueError(
                f'area_ratio_range must rise within (0, 1], got {area_ratio_range}.'
            )
        least, greatest = aspect_range
        if not 0 < least <= greatest:
            raise ValueError(f'aspect_range must rise above 0, got {aspect_range}.')
        self.prob = prob
        self.area_ratio_range = area_ratio_range
        self.aspect_range = aspect_range

    @cache_randomness
    def random_box(
        self, height: int, width: int
    ) -> Optional[Tuple[int, int, int, int]]:
        """Draw top, left, height and width; None if no box shall be or fits."""
        if np.random.rand() >= self.prob:
            return None
        least, greatest = map(math.log, self.aspect_range)
        for _ in range(_ATTEMPTS):
            area = height * width * np.random.uniform(*self.area_ratio_range)
            aspect = math.exp(np.random.uniform(least, greatest))
            rows = int(round(math.sqrt(area * aspect)))
            columns = int(round(math.sqrt(area / aspect)))
            if rows < height and columns < width:
                top = np.random.randint(height - rows + 1)
                left = np.random.randint(width - columns + 1)
                return top, left, rows, columns
        return None

    def transform(self, results: dict) -> dict:
        """Draw a box for a packed sample."""
        if 'inputs' not in results:
            raise ValueError(
                'DrawErasing draws a box of a packed image, but the image is not '
                'packed yet. Put it behind PackInputs.'
            )
        box = self.random_box(*results['inputs'].shape[-2:])
        if box is not None:
            seed = int(np.random.randint(2**63, dtype=np.uint64))
            results['data_samples'].set_metainfo(dict(erasing=(*box, seed)))
        return results

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(prob={self.prob}, '
            f'area_ratio_range={self.area_ratio_range}, '
            f'aspect_range={self.aspect_range})'
        )

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Mixup and CutMix of each image with its mirror image in the batch, as timm's."""

from typing import Tuple

import numpy as np
from mmpretrain.models.utils.batch_augments import CutMix, Mixup
from mmpretrain.registry import BATCH_AUGMENTS
from torch import Tensor


@BATCH_AUGMENTS.register_module()
class ReversedMixup(Mixup):
    r"""Mixup of a batch with itself in reverse order.

    Image i of n becomes :math:`\lambda x_i + (1 - \lambda) x_{n-1-i}`, its label
    likewise, with one :math:`\lambda \sim Beta(\alpha, \alpha)` for the batch
    (`Zhang et al., 2018 <https://arxiv.org/abs/1710.09412>`_). mmpretrain's ``Mixup``
    pairs images at random instead.

    Args:
        alpha (float): Parameter of the distribution, positive.
    """

    def mix(self, batch_inputs: Tensor, batch_scores: Tensor) -> Tuple[Tensor, Tensor]:
        """Mix images (N, C, H, W) and label scores (N, num_classes)."""
        ratio = np.random.beta(self.alpha, self.alpha)
        return _blend(batch_inputs, ratio), _blend(batch_scores, ratio)


@BATCH_AUGMENTS.register_module()
class ReversedCutMix(CutMix):
    r"""CutMix of a batch with itself in reverse order.

    Image i of n gets a box of image n-1-i. The box has the area :math:`1 - \lambda` of
    the image where it does not cross the border, with one
    :math:`\lambda \sim Beta(\alpha, \alpha)` for the batch. Labels are mixed by the
    area of the box inside the image
    (`Yun et al., 2019 <https://arxiv.org/abs/1905.04899>`_). mmpretrain's
    ``CutMix`` pairs images at random instead.

    Args:
        alpha (float): Parameter of the distribution, positive.
        **kwargs: Further arguments of mmpretrain's ``CutMix``.
    """

    def mix(self, batch_inputs: Tensor, batch_scores: Tensor) -> Tuple[Tensor, Tensor]:
        """Mix images (N, C, H, W) and label scores (N, num_classes)."""
        ratio = np.random.beta(self.alpha, self.alpha)
        box, ratio = self.cutmix_bbox_and_lam(batch_inputs.shape[-2:], ratio)
        top, bottom, left, right = box
        inside = ..., slice(top, bottom), slice(left, right)
        mixed = batch_inputs.clone()
        mixed[inside] = batch_inputs.flip(0)[inside]
        return mixed, _blend(batch_scores, ratio)


def _blend(batch: Tensor, ratio: float) -> Tensor:
    return ratio * batch + (1 - ratio) * batch.flip(0)

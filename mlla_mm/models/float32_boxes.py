# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Parts of detectors that keep boxes in float32 under mixed precision.

mmdet gives boxes the dtype of the maps that they are computed from or pooled from. In
half precision that is too coarse: at an image's far side bfloat16 is a grid of 8 pixels
and float16 one of 1 pixel, and float16 has no area above 65504, a box of 256 by 256.

Importing this module needs mmdet.
"""

from typing import Optional, Sequence, Tuple

from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.registry import MODELS
from torch import Tensor

from ..ops.naive import at_least_float32


@MODELS.register_module()
class Float32RPNHead(RPNHead):
    """mmdet's RPN head, with scores and deltas in float32.

    The convolutions still run in half precision. Anchors take the dtype of the scores,
    so all that follows is in float32: decoding, the ranking of proposals, NMS and the
    assignment of targets. With float32 maps this is mmdet's head.

    Args:
        *args: Arguments of mmdet's ``RPNHead``.
        **kwargs: Further ones.
    """

    def forward_single(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Scores and deltas of one level.

        Args:
            x (Tensor): Map of shape (N, in_channels, H, W).

        Returns:
            tuple[Tensor, Tensor]: Logits (N, A, H, W) and deltas (N, 4 A, H, W) of A
            anchors per pixel.
        """
        score, delta = super().forward_single(x)
        return at_least_float32(score), at_least_float32(delta)


@MODELS.register_module()
class Float32RoIExtractor(SingleRoIExtractor):
    r"""mmdet's extractor, with levels and coordinates in float32.

    A box of width w and height h is pooled from the level

    .. math:: k = \lfloor \log_2 (\sqrt{w h} / s) \rfloor

    of FPN (`Lin et al., 2017 <https://arxiv.org/abs/1612.03144>`_), or the nearest that
    there is. The finest is level 0, and s is ``finest_scale``. mmdet casts boxes to the
    dtype of the maps before that. Here maps of half precision are cast to float32, in
    which RoIAlign then runs: mmcv's compiled one wants maps and boxes of one dtype.
    With float32 maps this is mmdet's extractor.

    Args:
        *args: Arguments of mmdet's ``SingleRoIExtractor``.
        **kwargs: Further ones.
    """

    def forward(
        self,
        feats: Sequence[Tensor],
        rois: Tensor,
        roi_scale_factor: Optional[float] = None,
    ) -> Tensor:
        """Pool the features of boxes.

        Args:
            feats (Sequence[Tensor]): Maps of shape (N, C, H, W), finest level first.
            rois (Tensor): Image index and ``(x1, y1, x2, y2)`` in pixels, of shape
                (K, 5).
            roi_scale_factor (float, optional): Factor for the sides of the boxes, which
                keep their levels. Defaults to None.

        Returns:
            Tensor: Features of shape (K, C, h, w), where (h, w) is ``output_size``, in
            the dtype of the maps.
        """
        maps = tuple(at_least_float32(feat) for feat in feats)
        return super().forward(maps, rois, roi_scale_factor).type_as(feats[0])

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""mmdet's transforms, faster. They have mmdet's names and arguments.

Samples and random draws stay the same, bit by bit. Importing this module needs mmdet.
"""

from typing import Any, Dict

from mmdet.datasets import transforms
from mmdet.structures.mask import PolygonMasks

from .images import FlipInMemory, PackInPlanes
from .instance_masks import InstanceMasks


class LoadAnnotations(transforms.LoadAnnotations):
    """mmdet's transform, with masks that are decoded when they are read.

    ``gt_masks`` is an :class:`~.instance_masks.InstanceMasks`, or a ``PolygonMasks`` if
    ``poly2mask`` is False.

    Args:
        *args: Arguments of mmdet's ``LoadAnnotations``.
        **kwargs: Further ones.
    """

    def _load_masks(self, results: dict) -> None:
        masks = self._process_masks(results)
        kind = InstanceMasks.from_annotations if self.poly2mask else PolygonMasks
        results['gt_masks'] = kind(masks, *results['ori_shape'])


class RandomFlip(FlipInMemory, transforms.RandomFlip):
    """mmdet's transform, with a contiguous image.

    Args:
        *args: Arguments of mmdet's ``RandomFlip``.
        **kwargs: Further ones.
    """


class PackDetInputs(PackInPlanes, transforms.PackDetInputs):
    """mmdet's transform, which also decodes the masks.

    So the workers decode, and send the boxes of the masks alone.

    Args:
        *args: Arguments of mmdet's ``PackDetInputs``.
        decode_masks (bool): Whether to decode. If False, masks are decoded where they
            are read: never in an evaluation that shows nothing. Defaults to True.
        **kwargs: Further ones.
    """

    def __init__(self, *args, decode_masks: bool = True, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.decode_masks = decode_masks

    def transform(self, results: dict) -> Dict[str, Any]:
        """Pack what is in ``results``.

        Args:
            results (dict): With ``img``, an array (H, W, C), and annotations.

        Returns:
            dict: ``inputs``, a tensor (C, H, W), and ``data_samples``.
        """
        masks = results.get('gt_masks')
        if self.decode_masks and isinstance(masks, InstanceMasks):
            masks.decode()
        return super().transform(results)

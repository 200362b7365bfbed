# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What the recipe does with a whole batch of images, on the device."""

from typing import Optional, Sequence

import torch
from mmengine.registry import MODELS
from mmpretrain.models import ClsDataPreprocessor, RandomBatchAugment
from mmpretrain.structures import DataSample
from torch import Tensor

from ..erasing import erase


@MODELS.register_module()
class ErasingDataPreprocessor(ClsDataPreprocessor):
    """Normalise a batch, erase boxes of its images, and mix the images.

    It is mmpretrain's ``ClsDataPreprocessor`` with two differences, in training alone:

    - Boxes drawn by :class:`mlla_mm.datasets.transforms.erasing.DrawErasing` are
      filled with noise after the normalisation, as timm does.
    - Label scores are made for the whole batch at once, and only if images are mixed.

    Args:
        batch_augments (dict, optional): As for ``ClsDataPreprocessor``; a classifier
            puts its ``train_cfg`` here. Defaults to None.
        **kwargs: The other arguments of ``ClsDataPreprocessor``.

    Raises:
        ValueError: In training, if a label is not in [0, num_classes).
    """

    def __init__(self, batch_augments: Optional[dict] = None, **kwargs) -> None:
        # Not given to the base class, which would make scores in evaluation as well.
        super().__init__(**kwargs)
        if batch_augments:
            self.batch_augments = RandomBatchAugment(**batch_augments)

    def forward(self, data: dict, training: bool = False) -> dict:
        """Prepare a batch.

        Args:
            data (dict): ``inputs``, images (N, C, H, W) or a list of (C, H, W), and
                ``data_samples``, a list of N ``DataSample`` or None.
            training (bool): Whether to erase and mix. Defaults to False.

        Returns:
            dict: The same keys; ``inputs`` are float32 (N, C, H, W) on the device.
        """
        samples = data.get('data_samples')
        if not (training and samples and isinstance(samples[0], DataSample)):
            return super().forward(data, training)
        has_labels = 'gt_label' in samples[0] or 'gt_score' in samples[0]
        mixes = self.batch_augments is not None and has_labels
        if mixes:
            # Without samples the base class only normalises.
            batch = super().forward(dict(inputs=data['inputs']))
            batch['data_samples'] = samples
        else:
            batch = super().forward(data)
        for image, sample in zip(batch['inputs'], samples):
            if 'erasing' in sample:
                erase(image, *sample.erasing)
        if mixes:
            batch['inputs'], scores = self.batch_augments(
                batch['inputs'], self._scores(samples)
            )
            for sample, score in zip(samples, scores):
                sample.set_gt_score(score)
        return batch

    def _scores(self, samples: Sequence[DataSample]) -> Tensor:
        """Label scores (N, num_classes): 1 for every label of an image, and else 0."""
        if 'gt_score' in samples[0]:
            return torch.stack([sample.gt_score for sample in samples]).to(self.device)
        labels = [label for sample in samples for label in sample.gt_label.tolist()]
        images = [i for i, sample in enumerate(samples) for _ in sample.gt_label]
        num_classes = self.num_classes or samples[0].get('num_classes')
        if num_classes is None:
            raise ValueError(
                'Mixup and CutMix need the number of classes, but there is none. Set '
                'model.data_preprocessor.num_classes.'
            )
        outside = [label for label in labels if not 0 <= label < num_classes]
        if outside:
            raise ValueError(
                f'An image has the label {outside[0]}, but '
                f'model.data_preprocessor.num_classes is {num_classes}. Set it, and '
                'model.head.num_classes, to the number of classes of the data.'
            )
        index = torch.tensor([images, labels])
        if self.device.type == 'cuda':
            # The copy of pinned memory does not wait for the device.
            index = index.pin_memory()
        images, labels = index.to(self.device, non_blocking=True)
        scores = torch.zeros(len(samples), num_classes, device=self.device)
        # Twice the same label counts once, as in mmpretrain's loss of several labels.
        scores[images, labels] = 1
        return scores

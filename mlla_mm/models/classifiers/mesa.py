# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from mmpretrain.models import ImageClassifier
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from ...compat.openmmlab import classification_losses


@MODELS.register_module()
class MESAClassifier(ImageClassifier):
    r"""Image classifier that also learns from a running average of itself.

    This is Memory-Efficient Sharpness-Aware training
    (`Du et al., 2022 <https://arxiv.org/abs/2205.14083>`_) as MLLA uses it. Once a
    teacher is set, the loss is

    .. math:: CE(z, y) + w \, CE(z, softmax(z_t))

    with the labels :math:`y`, the logits :math:`z` of this model, and the logits
    :math:`z_t` of the teacher. Both models get the same images after batch
    augmentations. :class:`mlla_mm.engine.hooks.MESAHook` keeps the average and sets it
    as the teacher.

    Args:
        mesa_weight (float): Weight w of the teacher's term. 0 switches the term off.
            Defaults to 1.0.
        **kwargs: Arguments of mmpretrain's ``ImageClassifier``.

    Raises:
        ValueError: If ``mesa_weight`` is negative.
    """

    def __init__(self, *args, mesa_weight: float = 1.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if mesa_weight < 0:
            raise ValueError(f'mesa_weight must be at least 0, got {mesa_weight}.')
        self.mesa_weight = mesa_weight
        # In a tuple the teacher is not a submodule. So its parameters are not trained,
        # saved or moved with this model, and train() does not change its mode.
        self._teacher: Tuple[nn.Module, ...] = ()

    def set_teacher(self, teacher: Optional[nn.Module]) -> None:
        """Set the teacher, or remove it.

        Args:
            teacher (nn.Module, optional): A classifier in evaluation mode that turns
                images into logits (N, num_classes). None removes the teacher.
        """
        self._teacher = () if teacher is None else (teacher,)

    def loss(self, inputs: Tensor, data_samples: List[DataSample]) -> Dict[str, Tensor]:
        """Losses of a batch.

        Args:
            inputs (Tensor): Images (N, C, H, W), normalised and mixed.
            data_samples (list[DataSample]): Labels, or label scores of mixed images.

        Returns:
            dict[str, Tensor]: ``loss_ce``, which is the loss of the head, and with a
            teacher ``loss_mesa``.
        """
        logits = self.head(self.extract_feat(inputs))
        losses = classification_losses(self.head, logits, data_samples)
        # MMEngine logs the sum of all losses as ``loss``.
        losses['loss_ce'] = losses.pop('loss')
        if self._teacher and self.mesa_weight:
            losses['loss_mesa'] = self.mesa_weight * self._teacher_loss(logits, inputs)
        return losses

    def _teacher_loss(self, logits: Tensor, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            target = self._teacher[0](inputs).float().softmax(dim=1)
        return F.cross_entropy(logits.float(), target)

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""A running average of a model's weights."""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def recipe_decay(total_batch_size: int) -> float:
    """Decay of MLLA's ImageNet recipe, 0.9996 per 4096 images.

    Args:
        total_batch_size (int): Images per optimiser step, of all processes.
    """
    return 0.9996 ** (total_batch_size / 4096)


class ModelEMA:
    """Exponential moving average of all values in a model's state dict.

    ``EMA_t = decay * EMA_(t-1) + (1 - decay) * W_t``, for parameters and BatchNorm
    statistics. The average starts from the weights that the model has now. Integer
    values are copied. (MMEngine's averages start from the model at their first update,
    and do not change integer values.)

    Args:
        model (nn.Module): The model to average.
        decay (float): Part of the average that an update keeps, in [0, 1).

    Attributes:
        decay (float): The argument.
        module (nn.Module): The averaged model, in evaluation mode, without gradients.

    Raises:
        ValueError: If ``decay`` is out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f'decay must be in [0, 1), got {decay}.')
        self.decay = decay
        self._average = get_ema_multi_avg_fn(decay)
        self.module = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with the model's weights after an optimiser step."""
        own = self.module.state_dict()
        averages, values = [], []
        for key, value in model.state_dict().items():
            if own[key].is_floating_point():
                averages.append(own[key])
                values.append(value)
            else:
                own[key].copy_(value)
        self._average(averages, values, None)

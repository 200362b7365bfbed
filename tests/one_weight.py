# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""A model of one weight, for runs in which something else is looked at."""

import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS


@MODELS.register_module()
class OneWeight(BaseModel):
    """It follows its inputs, and predicts its weight."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, inputs, mode):
        if mode == 'predict':
            return [self.weight.item()]
        return dict(loss=(self.weight - inputs).square().sum())

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from torch import Tensor, nn

from ...ops import layer_norm


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps (..., C).

    Args:
        channels (int): Number of channels C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

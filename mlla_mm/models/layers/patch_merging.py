# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from torch import Tensor, nn

from ... import ops
from .conv import ConvLayer

# Hidden channels for each input channel.
_EXPANSION = 8


class PatchMerging(nn.Module):
    """Halve the resolution and double the channels with an inverted bottleneck.

    Args:
        in_channels (int): Number of input channels d; the output has 2d.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        hidden = in_channels * _EXPANSION
        self.conv = nn.Sequential(
            ConvLayer(in_channels, hidden, 1, bias=True, norm=False),
            ConvLayer(
                hidden, hidden, 3, stride=2, groups=hidden, bias=True, norm=False
            ),
            ConvLayer(hidden, in_channels * 2, 1, bias=True, act=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, d, H, W) -> (N, 2d, ceil(H / 2), ceil(W / 2))."""
        return self.conv(ops.pad_to_multiple(x, 2))

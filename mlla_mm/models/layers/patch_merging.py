# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from torch import Tensor, nn

from ... import ops
from .conv import ConvLayer

# Number of hidden channels for each input channel.
_EXPANSION = 8


class PatchMerging(nn.Module):
    """Halve the resolution and double the channels, by an inverted bottleneck.

    A 1x1 convolution widens the map, a 3x3 depthwise convolution with stride 2 halves
    it, and a 1x1 convolution narrows it.

    Args:
        in_channels (int): Number of input channels d. The output has 2d channels.
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
        x = ops.pad_to_multiple(x, 2)
        return ops.patch_merging(x, self.conv, readable=ConvLayer)

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import torch
from torch import Tensor, nn

from ... import ops
from .conv import ConvLayer


class Stem(nn.Module):
    """Convolutional stem of MLLA, from images to a map at stride 4.

    Args:
        in_channels (int): Number of image channels.
        embed_dims (int): Number of output channels C, an even number.
        drop_rate (float): Dropout rate after the stem. Defaults to 0.
    """

    def __init__(
        self, in_channels: int, embed_dims: int, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        mid = embed_dims // 2
        self.conv1 = ConvLayer(in_channels, mid, 3, stride=2)
        self.conv2 = nn.Sequential(
            ConvLayer(mid, mid, 3), ConvLayer(mid, mid, 3, act=False)
        )
        self.conv3 = nn.Sequential(
            ConvLayer(mid, embed_dims * 4, 3, stride=2),
            ConvLayer(embed_dims * 4, embed_dims, 1, act=False),
        )
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, C, ceil(H / 4), ceil(W / 4))."""
        # All maps from here on have this layout.
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv1(ops.pad_to_multiple(x, 4))
        x = x + self.conv2(x)
        return self.drop(self.conv3(x))

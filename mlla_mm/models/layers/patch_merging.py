# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import is_fused, linear_relu
from ...ops.dispatch import in_parts
from .conv import ConvLayer, pad_to_multiple
from .unmodified import is_unmodified

# Hidden channels for each input channel.
_EXPANSION = 8
# Fewer channels at a time would make their matrix product slower.
_MIN_CHANNELS = 64


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
        x = pad_to_multiple(x, 2)
        if not is_unmodified(nn.Sequential, self.conv):
            return self.conv(x)
        expand = self.conv[0]
        if is_fused(x) and _is_unmodified(expand):
            # In the order of channels-last memory, so that the gradient has it too.
            weight = expand.conv.weight.permute(0, 2, 3, 1).flatten(1)
            bias = expand.conv.bias
            x = linear_relu(x.permute(0, 2, 3, 1), weight, bias)
            return self.conv[1:](x.permute(0, 3, 1, 2))
        hidden = self.conv[0].conv.out_channels
        parts = min(in_parts(x, _EXPANSION), -(-hidden // _MIN_CHANNELS))
        return self.conv(x) if parts == 1 else self._forward_in_parts(x, parts)

    def _forward_in_parts(self, x: Tensor, parts: int) -> Tensor:
        """Expand and reduce groups of channels, one after the other.

        All together at full resolution are the largest map of the network.
        """
        expand, reduce, project = self.conv
        if not (_is_unmodified(expand) and _is_unmodified(reduce)):
            return self.conv(x)
        weights = (
            tensor.chunk(parts)
            for layer in (expand.conv, reduce.conv)
            for tensor in (layer.weight, layer.bias)
        )
        return project(torch.cat([_bottleneck(x, *part) for part in zip(*weights)], 1))


def _is_unmodified(layer: nn.Module) -> bool:
    return is_unmodified(ConvLayer, layer) and layer.has_own_layers()


def _bottleneck(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    """Expand to some of the hidden channels, and reduce their resolution."""
    x = F.relu_(F.conv2d(x, weight1, bias1))
    x = F.conv2d(x, weight2, bias2, stride=2, padding=1, groups=len(weight2))
    return F.relu_(x)

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from torch import Tensor, nn

from ...ops import is_fused, linear_relu
from .conv import ConvLayer, pad_to_multiple
from .unmodified import is_unmodified

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
        return self.conv(x)


def _is_unmodified(layer: nn.Module) -> bool:
    return is_unmodified(ConvLayer, layer) and layer.has_own_layers()

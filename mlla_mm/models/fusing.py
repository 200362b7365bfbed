# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""BatchNorm inside of convolutions, for inference."""

from collections import Counter

import mmcv.cnn
from torch import nn


def fuse_conv_bn(model: nn.Module) -> nn.Module:
    """Fold every BatchNorm into the convolution before it, once, by mmcv's function.

    ::

        w' = w * gamma / sqrt(var + eps)
        b' = beta + (b - mean) * gamma / sqrt(var + eps)

    Results differ by rounding. The model is for inference from then on.

    Args:
        model (nn.Module): A model of any kind; changed in place.

    Returns:
        nn.Module: The model.

    Raises:
        ValueError: If mmcv's function, which goes by the order in which layers were
            made, would change what the model computes.
    """
    uses = Counter(
        id(module)
        for _, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Conv2d)
    )
    for name, module in model.named_modules():
        if uses[id(module)] > 1:
            problem = 'is used in several places, maybe with a BatchNorm in each'
        elif isinstance(module, mmcv.cnn.ConvModule) and _begins_with_norm(module):
            problem = 'has its BatchNorm before the convolution'
        else:
            continue
        raise ValueError(
            f'BatchNorm cannot be folded into convolutions: {name} {problem}. Leave '
            'fuse_conv_bn out.'
        )
    return mmcv.cnn.fuse_conv_bn(model)


def _begins_with_norm(module: mmcv.cnn.ConvModule) -> bool:
    order = module.order
    return module.with_norm and order.index('norm') < order.index('conv')

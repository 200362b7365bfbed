# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from mmcv.cnn import fuse_conv_bn
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class FuseConvBNHook(Hook):
    """Fold BatchNorm into the convolutions before it, when a test has its weights.

    ``w' = w * gamma / sqrt(var + eps)`` and ``b' = beta + (b - mean) * gamma /
    sqrt(var + eps)``, in all parts of the model. Results differ by rounding.
    """

    def before_test(self, runner) -> None:
        fuse_conv_bn(runner.model)

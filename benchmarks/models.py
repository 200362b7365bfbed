# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The models that can be raced: MLLA, its other assemblies, and mmpretrain's."""

from itertools import product
from typing import Any, Dict

from torch import nn

from mlla_mm.apis.model import Classifier
from mlla_mm.models import MLLA

from .forced_mlla import EagerMLLA, FusedMLLA
from .plain_mlla import PlainMLLA

SIZES = ('t', 's', 'b')
#: Classes that compute one function from the same weights.
ASSEMBLIES = dict(mlla=MLLA, fused=FusedMLLA, eager=EagerMLLA, plain=PlainMLLA)
# Names in mmpretrain's model zoo.
_ZOO = dict(swin='swin-{}_16xb64_in1k', convnext='convnext-{}_32xb128_in1k')
_SIZE_NAMES = dict(t='tiny', s='small', b='base')
#: Names of the models that can be raced.
MODELS = tuple(
    f'{family}-{size}' for family, size in product((*ASSEMBLIES, *_ZOO), SIZES)
)
#: The models that are raced by default.
DEFAULT_MODELS = ('mlla-t', 'plain-t', 'swin-t', 'convnext-t')


def build_model(name: str, classify: bool) -> nn.Module:
    """Build a model with random weights, without stochastic depth.

    Args:
        name (str): One of :data:`MODELS`. 'mlla-t' is :class:`mlla_mm.models.MLLA`,
            'fused-t' takes all Triton kernels, 'eager-t' takes none, and 'plain-t' is
            the plain assembly. The others are mmpretrain's.
        classify (bool): Whether to build a classifier of 1000 classes. Else a backbone
            is built that returns the maps of all four stages.
    """
    family, size = name.split('-')
    if family in ASSEMBLIES:
        backbone = ASSEMBLIES[family](size, out_indices=3 if classify else (0, 1, 2, 3))
        return Classifier(backbone, 1000) if classify else backbone

    from mmpretrain.apis import get_model

    options: Dict[str, Any] = dict(drop_path_rate=0.0)
    if family == 'swin':
        # Swin refuses maps that are smaller than a window.
        options.update(pad_small_map=True)
    if not classify:
        options.update(out_indices=(0, 1, 2, 3))
        if family == 'convnext':
            options.update(gap_before_final_norm=False)
    model = get_model(_ZOO[family].format(_SIZE_NAMES[size]), backbone=options)
    return model if classify else model.backbone

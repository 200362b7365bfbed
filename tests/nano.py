# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Small models of all three tasks, with random weights."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

CONFIGS = Path(__file__).parents[1] / 'configs'
NANO = {
    'mmdet': CONFIGS / 'detection/mask-rcnn_mlla-nano_fpn_digits.py',
    'mmseg': CONFIGS / 'segmentation/upernet_mlla-nano_digits.py',
    'mmpretrain': CONFIGS / 'classification/mlla-nano_digits.py',
}
CLASSES = {
    'mmdet': tuple('abcdefghij'),
    'mmseg': ('ground', *'abcdefghij'),
    'mmpretrain': tuple('abcdefghij'),
}


def build(cfg: Config) -> torch.nn.Module:
    """A model of random weights, with statistics that are not BatchNorm's initial."""
    pytest.importorskip(cfg.default_scope)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    for name, buffer in model.named_buffers():
        if name.endswith('running_var'):
            buffer.uniform_(0.5, 1.5)
    return model


def save(scope: str, path: Path) -> Config:
    """Save a checkpoint with plain and averaged weights; returns its config."""
    cfg = Config.fromfile(NANO[scope])
    weights = build(cfg).state_dict()
    averaged = {key: value + 1 for key, value in weights.items()}
    # Names that are no digits, to tell them from the config's.
    meta = dict(classes=CLASSES[scope], palette=[(9, 200, 9)] * 11)
    torch.save(
        dict(state_dict=weights, state_dict_ema=averaged, meta=dict(dataset_meta=meta)),
        path,
    )
    return cfg

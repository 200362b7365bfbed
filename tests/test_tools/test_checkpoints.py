# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The tools with checkpoints of the authors', of others, and of nobody to trust."""

import pickle

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from .. import checkpoints
from ..processes import ROOT
from ..runs import without_workers

pytest.importorskip('mmpretrain')

CONFIG = 'configs/classification/mlla-nano_digits.py'


def options(data):
    return ['--cfg-options', *without_workers(data, 'train', 'val', 'test')]


def predictions(path):
    return torch.stack([p['pred_score'] for p in pickle.loads(path.read_bytes())])


def test_official_checkpoint_is_evaluated(call_tool, tmp_path, digits_imagenet):
    cfg = Config.fromfile(ROOT / CONFIG)
    init_default_scope('mmpretrain')
    model = MODELS.build(cfg.model).eval()
    # Scores that differ between classes.
    torch.nn.init.normal_(model.head.fc.weight, std=3)
    official = tmp_path / 'official.pth'
    weights = {
        key.replace('backbone.norm3', 'norm')
        .replace('head.fc', 'head')
        .replace('backbone.', ''): value
        for key, value in model.state_dict().items()
    }
    weights['layers.0.blocks.0.attn.rope.rotations'] = torch.zeros(3, 3, 2)
    checkpoints.save_official_training(weights, official)
    call_tool(
        *('tools/test.py', CONFIG, official, '--work-dir', tmp_path),
        *('--out', tmp_path / 'scores.pkl', *options(digits_imagenet)),
    )
    cfg.merge_from_dict(
        dict(
            pair.split('=')
            for pair in options(digits_imagenet)[1:]
            if 'data_root' in pair
        )
    )
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    expected = [
        sample.pred_score
        for batch in Runner.build_dataloader(cfg.test_dataloader)
        for sample in model.test_step(batch)
    ]
    scores = predictions(tmp_path / 'scores.pkl')
    assert scores.std() > 0.05
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_checkpoints_that_are_refused(call_tool, tmp_path, digits_imagenet):
    bad, marker = tmp_path / 'bad.pth', tmp_path / 'ran'
    content = checkpoints.attacks(marker)['deep in weights']
    checkpoints.save_pickle(content, bad, legacy=False)
    command = ('tools/test.py', CONFIG, bad, '--work-dir', tmp_path)
    command += tuple(options(digits_imagenet))
    result = call_tool(*command, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith('Error: ')
    assert str(bad) in result.stderr and '--trust-checkpoint' in result.stderr
    assert not marker.exists()
    # The same in the config; what it holds is no checkpoint even so.
    result = call_tool(*command, 'trust_checkpoint=True', check=False)
    assert result.returncode == 1
    assert 'no weights' in result.stderr
    assert marker.exists()


def test_pretrained_weights_of_another_size(call_tool, tmp_path, digits_imagenet):
    official = tmp_path / 'MLLA_T.pth'
    torch.save({'model': checkpoints.official_classifier('t')}, official)
    result = call_tool(
        'tools/train.py', CONFIG, '--work-dir', tmp_path, *options(digits_imagenet),
        'model.backbone.init_cfg.type=Pretrained',
        f'model.backbone.init_cfg.checkpoint={official}', check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.startswith('Error: ')
    for word in (str(official), 'MLLA-T', 'embed_dims 64', 'depths 2-4-8-4'):
        assert word in result.stderr

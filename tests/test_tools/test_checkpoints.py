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

pytest.importorskip('mmpretrain')

CONFIG = 'configs/classification/mlla-nano_digits.py'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    from mlla_mm.datasets.digits import make_imagenet

    out = tmp_path_factory.mktemp('data') / 'digits'
    return make_imagenet(out, train=16, val=6, size=32)


def options(data):
    words = [f'{split}_dataloader.num_workers=0' for split in ('train', 'val', 'test')]
    words += [f'{w.split(".")[0]}.persistent_workers=False' for w in words]
    words += [
        f'{split}_dataloader.dataset.data_root={data}'
        for split in ('train', 'val', 'test')
    ]
    return ['--cfg-options', *words]


def predictions(path):
    return torch.stack([p['pred_score'] for p in pickle.loads(path.read_bytes())])


def test_official_checkpoint_is_evaluated(run_tool, tmp_path, data):
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
    run_tool(
        *('python', 'tools/test.py', CONFIG, official, '--work-dir', tmp_path),
        *('--out', tmp_path / 'scores.pkl', *options(data)),
    )
    cfg.merge_from_dict(
        dict(pair.split('=') for pair in options(data)[1:] if 'data_root' in pair)
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


def run(run_tool, tool, *arguments):
    result = run_tool('python', f'tools/{tool}.py', CONFIG, *arguments, check=False)
    assert result.returncode == 1
    return result.stdout


def test_checkpoints_that_are_refused(run_tool, tmp_path, data):
    bad, marker = tmp_path / 'bad.pth', tmp_path / 'ran'
    content = checkpoints.attacks(marker)['deep in weights']
    checkpoints.save_pickle(content, bad, legacy=False)
    more = ['--work-dir', tmp_path, *options(data)]
    output = run(run_tool, 'test', bad, *more)
    assert 'Traceback' not in output
    assert f'Error: {bad} is not loaded: it asks for' in output
    assert '--trust-checkpoint' in output
    assert not marker.exists()
    # The same in the config; what it holds is no checkpoint even so.
    output = run(run_tool, 'test', bad, *more, 'trust_checkpoint=True')
    assert 'holds no weights' in output
    assert marker.exists()


def test_pretrained_weights_of_another_size(run_tool, tmp_path, data):
    official = tmp_path / 'MLLA_T.pth'
    torch.save({'model': checkpoints.official_classifier('t')}, official)
    output = run(
        *(run_tool, 'train', '--work-dir', tmp_path, *options(data)),
        'model.backbone.init_cfg.type=Pretrained',
        f'model.backbone.init_cfg.checkpoint={official}',
    )
    assert 'Traceback' not in output
    assert f'Error: The weights of {official} do not fit the model' in output
    assert 'The file holds MLLA-T (embed_dims 64, depths 2-4-8-4)' in output

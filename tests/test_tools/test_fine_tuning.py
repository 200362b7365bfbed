# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Real runs that start from, resume and test a whole model of other classes."""

import json

import pytest
import torch
from mmengine.config import Config

from mlla_mm.datasets.digits import make_ade20k
from mlla_mm.reproducible.resume import newest_checkpoint

from ..nano import NANO, build
from ..processes import ROOT

CONFIG = """
_base_ = {base!r}
train_dataloader = dict(num_workers=0, persistent_workers=False,
                        dataset=dict(data_root={data!r}))
val_dataloader = dict(num_workers=0, persistent_workers=False,
                      dataset=dict(data_root={data!r}))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=1, val_interval=9)
default_hooks = dict(checkpoint=dict(interval=1))
allow_empty_classes = True
# Weights that change so little show where they come from.
optim_wrapper = dict(optimizer=dict(lr=0.0))
param_scheduler = None
{more}
"""
RESNET = """
model = dict(
    backbone=dict(_delete_=True, type='ResNetV1c', depth=18, style='pytorch',
                  norm_cfg=dict(type='BN'), out_indices=(0, 1, 2, 3)),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
"""
# What a run of several processes has in each of them.
COMPARED = """
import torch
from mmengine.dist import all_gather
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class CompareHook(Hook):
    priority = 'LOWEST'

    def before_train(self, runner):
        state = runner.model.module.decode_head.state_dict()
        (average,) = (x.ema_model for x in runner.hooks if hasattr(x, 'ema_model'))
        for values in (state, average.module.decode_head.state_dict()):
            for key, value in values.items():
                first, second = all_gather(value.float())
                assert torch.equal(first, second), key
                assert torch.equal(value, state[key]), key
        # One write for each process, so that none comes between another's words.
        print(f'\\nequal in {torch.distributed.get_rank()}\\n', flush=True)
"""
MISFITS = ['decode_head.conv_seg', 'auxiliary_head.conv_seg']


@pytest.fixture
def files(tmp_path):
    """Writes a config, and the checkpoint of a model with two classes fewer."""
    pytest.importorskip('mmseg')
    data = make_ade20k(tmp_path / 'data', train=4, val=2, size=48)

    def write(more=''):
        path = tmp_path / 'config.py'
        base = str(NANO['mmseg'])
        path.write_text(CONFIG.format(base=base, data=str(data), more=more))
        other = Config.fromfile(path)
        for head in ('decode_head', 'auxiliary_head'):
            other.model[head].num_classes = 9
        weights = build(other).state_dict()
        meta = dict(dataset_meta=dict(classes=tuple('abcdefghi')))
        torch.save(dict(state_dict=weights, meta=meta), tmp_path / 'other.pth')
        return path, tmp_path / 'other.pth', weights

    return write


def fresh(state, weights):
    """The tensors of a run without a learning rate that are not the file's."""
    return {
        key.rpartition('.')[0]
        for key, value in state.items()
        if 'running' not in key
        and value.is_floating_point()
        and not torch.equal(value, weights[key])
    }


@pytest.mark.parametrize(
    'more',
    [
        pytest.param('', id='MLLA'),
        pytest.param(RESNET, id='ResNet', marks=pytest.mark.slow),
    ],
)
def test_training_alone_starts_from_other_classes(tmp_path, call_tool, files, more):
    config, other, weights = files(more)
    work_dir = tmp_path / 'work'
    run = call_tool(
        'tools/train.py', config, '--work-dir', work_dir,
        '--cfg-options', f'load_from={other}',
    )  # fmt: skip
    (line,) = (x for x in run.stdout.splitlines() if 'start fresh' in x)
    assert '9 classes (a, b, c, …), the model 11' in line
    assert 'size mismatch' not in run.stdout + run.stderr
    state = torch.load(newest_checkpoint(work_dir), weights_only=False)['state_dict']
    # The biases are zero in both, but have other lengths.
    assert fresh(state, weights) == set(MISFITS)
    assert all(name in line for name in MISFITS)

    strict = [
        ('tools/test.py', config, other, '--work-dir', work_dir),
        ('tools/train.py', config, '--resume', other, '--work-dir', work_dir),
        ('tools/infer.py', tmp_path, config, other, '--out', tmp_path / 'out'),
        ('tools/export.py', config, other, '--format', 'torchscript'),
    ]
    content = torch.load(other)
    runtime = torch.load(newest_checkpoint(work_dir), weights_only=False)
    torch.save({**runtime, **content, 'meta': runtime['meta']}, other)
    for tool, *arguments in strict:
        refused = call_tool(tool, *arguments, check=False)
        assert refused.returncode == 1, tool
        words = ['conv_seg.weight: (9, ', '(11, ', 'load_from, without --resume']
        assert all(word in refused.stderr for word in words), refused.stderr


def test_all_processes_have_the_same_fresh_heads(
    tmp_path, run_tool, files, monkeypatch
):
    hooks = "custom_hooks = [dict(type='EMAHook'), dict(type='CompareHook')]\n"
    imports = "custom_imports = dict(imports=['mlla_mm', 'compared'])\n"
    seeds = 'randomness = dict(seed=1, diff_rank_seed=True)\n'
    (tmp_path / 'compared.py').write_text(COMPARED)
    monkeypatch.syspath_prepend(tmp_path)
    config, other, _ = files(hooks + imports + seeds)
    run = run_tool(
        'python', ROOT / 'tools/train.py', config, '--launcher', 'pytorch',
        '--work-dir', tmp_path / 'work', '--cfg-options', f'load_from={other}',
        cwd=tmp_path, processes=2,
    )  # fmt: skip
    assert 'equal in 0' in run.stdout and 'equal in 1' in run.stdout
    assert run.stdout.count('start fresh') == 1


def test_other_misfits_stay_errors(tmp_path, call_tool, files):
    config, other, weights = files(RESNET)
    tool = 'tools/train.py', config, '--work-dir', tmp_path, '--cfg-options'
    tool = *tool, f'load_from={other}'
    backbone = {k: v for k, v in weights.items() if k.startswith('backbone.')}
    bare = {key.removeprefix('backbone.'): value for key, value in backbone.items()}
    key = 'decode_head.bottleneck.conv.weight'
    misshaped = dict(weights, **{key: torch.ones(3, 3)})
    for content, words in (
        (backbone, ['lacks what is listed', 'init_cfg.prefix=backbone.']),
        (bare, ['holds a backbone alone', 'init_cfg.type=Pretrained']),
        (misshaped, [f'{key}: (3, 3) in the file']),
    ):
        torch.save(dict(state_dict=content), other)
        refused = call_tool(*tool, check=False)
        assert refused.returncode == 1
        assert all(word in refused.stderr for word in words), refused.stderr


@pytest.mark.slow
def test_averages_of_mmengine(tmp_path, call_tool, files):
    """What is tested is the average, with and without --ema, and with the hook."""
    config, _, _ = files("custom_hooks = [dict(type='EMAHook', momentum=0.5)]")
    text = config.read_text().replace('lr=0.0', 'lr=0.02')
    # The average begins with the weights after the first update.
    config.write_text(text.replace('max_iters=1', 'max_iters=2'))
    plain = tmp_path / 'plain.py'
    plain.write_text(config.read_text().replace('custom_hooks', 'unused'))
    work_dir = tmp_path / 'work'
    call_tool('tools/train.py', config, '--work-dir', work_dir)
    checkpoint = newest_checkpoint(work_dir)
    content = torch.load(checkpoint, weights_only=False)
    key = 'decode_head.conv_seg.weight'
    swapped = content['ema_state_dict'][f'module.{key}']
    assert not torch.equal(content['state_dict'][key], swapped)
    # So that they measure otherwise: the plain weights see one class alone.
    content['ema_state_dict']['module.decode_head.conv_seg.bias'][5] = 1e3
    torch.save(content, checkpoint)

    found = set()
    for number, (path, *options) in enumerate(
        [(config,), (config, '--ema', '--fuse-conv-bn'), (plain,), (plain, '--ema')]
    ):
        folder = tmp_path / f'test{number}'
        call_tool('tools/test.py', path, checkpoint, '--work-dir', folder, *options)
        (log,) = folder.glob('*/2*.json')
        found.add(json.loads(log.read_text())['aAcc'])
        (record,) = folder.glob('*/vis_data/run.json')
        assert json.loads(record.read_text())['averaged_weights'] is True
    by_hand = dict()
    for name, weights in (
        ('average', content['state_dict']),
        ('plain', {k[7:]: v for k, v in content['ema_state_dict'].items() if '.' in k}),
    ):
        torch.save(dict(state_dict=weights), tmp_path / 'hand.pth')
        folder = tmp_path / name
        call_tool('tools/test.py', plain, tmp_path / 'hand.pth', '--work-dir', folder)
        (log,) = folder.glob('*/2*.json')
        by_hand[name] = json.loads(log.read_text())['aAcc']
    assert found == {by_hand['average']} != {by_hand['plain']}
    refused = call_tool(
        'tools/test.py', plain, tmp_path / 'hand.pth', '--ema',
        '--work-dir', work_dir, check=False,
    )  # fmt: skip
    assert refused.returncode == 1 and "'ema_state_dict'" in refused.stderr

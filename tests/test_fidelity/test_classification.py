# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""24 updates with MESA, averaged weights, clipping and schedule, as the authors'."""

import itertools
from typing import Dict

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from mlla_mm.checkpoints.layout import to_own_layout, to_own_names
from mlla_mm.engine.hooks import MESAHook

from ..processes import restored_state
from . import authors

pytest.importorskip('mmpretrain.models')  # now, because importing it takes long
from mmpretrain.structures import DataSample  # noqa: E402

BATCHES, EPOCHS, BATCH = 3, 8, 4
RTOL = 1e-9
# Biases before BatchNorm: their true gradient is zero, so rounding alone moves them.
WITHOUT_GRADIENT = [f'layers.{i}.downsample.conv.2.conv.bias' for i in range(3)]


def config(work_dir):
    cfg = authors.config('classification/mlla-s_8xb64_in1k.py')
    cfg.model.backbone.arch = dict(
        embed_dims=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)
    )
    cfg.model.head.update(in_channels=256, num_classes=10)
    cfg.model.head.loss.label_smooth_val = 0.0  # the targets are soft
    cfg.model.train_cfg = None  # and the images mixed
    cfg.model.data_preprocessor = dict(type='ClsDataPreprocessor', num_classes=10)
    cfg.train_cfg.max_epochs = cfg.param_scheduler.end = EPOCHS
    cfg.param_scheduler.warmup = 3
    # Without mixed precision.
    cfg.optim_wrapper.type = 'OptimWrapper'
    del cfg.optim_wrapper['loss_scale']
    # The recipe's decay would leave the teacher where it began.
    cfg.default_hooks.mesa.decay = 0.9
    cfg.default_hooks.checkpoint.update(interval=-1, save_last=False, save_best=None)
    for split in ('val', 'test'):
        cfg[f'{split}_dataloader'] = cfg[f'{split}_cfg'] = None
        cfg[f'{split}_evaluator'] = None
    cfg.train_dataloader = dict(
        batch_size=BATCH,
        dataset=list(range(BATCHES * BATCH)),
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    cfg.work_dir = str(work_dir)
    return cfg


def batch(update: int) -> dict:
    name = f'classification/{update}'
    targets = authors.uniform(f'{name}/targets', (BATCH, 10)) ** 4
    scores = targets / targets.sum(1, keepdim=True)
    return dict(
        inputs=authors.normal(f'{name}/images', (BATCH, 3, 64, 64)),
        data_samples=[DataSample().set_gt_score(score) for score in scores],
    )


class Recorder(Hook):
    """What the log has of every update."""

    priority = 'VERY_LOW'

    def __init__(self):
        self.found = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        (rate,) = {group['lr'] for group in runner.optim_wrapper.param_groups}
        self._note('learning_rate', rate)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        # There is no teacher before the second quarter.
        for name in ('loss', 'loss_ce', 'loss_mesa'):
            self._note(name, float(outputs.get(name, 0.0)))
        norm = runner.message_hub.get_scalar('train/grad_norm').current()
        self._note('gradient_norm', norm)

    def _note(self, name, value):
        self.found.setdefault(name, []).append(value)


@pytest.fixture(scope='module')
def expected() -> dict:
    return authors.recorded('classification_training')


@pytest.fixture(scope='module')
def run(expected, tmp_path_factory):
    """What was logged, and the first, the trained and the averaged weights.

    The weights have the authors' names.
    """
    names = expected['names'].tolist()
    numbers = {name: torch.full((1, 1), i) for i, name in enumerate(names)}
    theirs = {ours: names[int(i)] for ours, i in to_own_names(numbers).items()}
    updates = itertools.count()
    with restored_state(), authors.float64('mmpretrain'):
        runner = Runner.from_cfg(config(tmp_path_factory.mktemp('run')))
        model = runner.model.double()
        shapes = {
            theirs[k]: x.shape for k, x in model.state_dict().items() if k in theirs
        }
        first = authors.weights(shapes, {'head.weight': 0.5})
        own = to_own_layout(dict(model=first), 'the first weights')['state_dict']
        model.load_state_dict(own)  # PyTorch adds the numbers of batches
        model.init_weights = lambda: None
        model.data_preprocessor.forward = lambda *_: batch(next(updates))
        recorder = Recorder()
        runner.register_hook(recorder)
        runner.train()
        (mesa,) = (hook for hook in runner.hooks if isinstance(hook, MESAHook))

    def by_name(state: Dict[str, Tensor]) -> Dict[str, Tensor]:
        return {theirs[k]: value for k, value in state.items() if k in theirs}

    trained, averaged = (m.state_dict() for m in (model, mesa.ema.module))
    return recorder.found, first, by_name(trained), by_name(averaged)


@pytest.mark.parametrize(
    'name', ['loss', 'loss_ce', 'loss_mesa', 'learning_rate', 'gradient_norm']
)
def test_updates(run, expected, name):
    found, *_ = run
    assert len(expected[name]) == EPOCHS * BATCHES
    np.testing.assert_allclose(found[name], expected[name], RTOL, atol=0)


@pytest.mark.parametrize('kind', ['weight', 'ema'])
def test_weights(run, expected, kind):
    """Norms after the last update, and of the differences to the first weights."""
    _, first, trained, averaged = run
    weights = dict(weight=trained, ema=averaged)[kind]
    names = expected['names'].tolist()
    assert set(names) == weights.keys() == first.keys()
    norms = [float(weights[name].norm()) for name in names]
    np.testing.assert_allclose(norms, expected[f'{kind}_norm'], RTOL, atol=0)
    changes = dict(zip(names, expected[f'{kind}_change']))
    for name in WITHOUT_GRADIENT:
        del changes[name]
    found = [float((weights[name] - first[name]).norm()) for name in changes]
    np.testing.assert_allclose(found, [*changes.values()], rtol=1e-6, atol=0)

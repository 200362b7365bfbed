# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Two real processes, each with its own data, so that their statistics differ."""

import json

import pytest
import torch

# A BatchNorm that is fed 1 by the first process and 3 by the second one. Its metric
# is the running mean that it is evaluated with.
SCRIPT = """
import json, sys
import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import METRICS
from mmengine.runner import Runner
from mlla_mm.engine import launch


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.bn = torch.nn.BatchNorm1d(1, momentum=0.5)

    def forward(self, inputs, mode):
        out = self.bn(inputs * (1 + 2 * get_rank()))
        if mode == 'loss':
            return dict(loss=out.sum())
        return [self.bn.running_mean.item()] * len(inputs)


@METRICS.register_module()
class Metric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        assert len(set(results)) == 1, results  # the processes agree
        return dict(running_mean=results[0])


def loader(batch_size):
    return dict(
        batch_size=batch_size,
        dataset=[dict(inputs=torch.ones(1)) for _ in range(8)],
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
    )


options = json.loads(sys.argv[1])
cfg = Config(dict(
    model=dict(), launcher='pytorch', work_dir=options['work_dir'],
    env_cfg=dict(dist_cfg=dict(backend='gloo')),
))
launch.set_up(cfg)
runner = Runner(
    model=Model(), launcher='pytorch', cfg=cfg, work_dir=cfg.work_dir,
    train_dataloader=loader(2), val_dataloader=loader(1),
    train_cfg=options['train_cfg'], val_cfg=dict(), val_evaluator=dict(type='Metric'),
    optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.0)),
    default_hooks=dict(checkpoint=dict(type='CheckpointHook', **options['checkpoint'])),
    custom_hooks=options['custom_hooks'], default_scope='mmengine',
)
runner.train()
launch.tear_down()
"""

BY_EPOCH = dict(by_epoch=True, max_epochs=2, val_interval=1)
BY_ITERATION = dict(type='IterBasedTrainLoop', max_iters=3, val_interval=2)


@pytest.fixture
def train(run_tool, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT)

    def run(hook, train_cfg, **checkpoint):
        work_dir = tmp_path / 'work'
        options = dict(
            work_dir=str(work_dir),
            train_cfg=train_cfg,
            checkpoint=checkpoint,
            custom_hooks=[dict(type=hook)],
        )
        run_tool('python', script, json.dumps(options), processes=2)
        log = next(work_dir.glob('*/vis_data/scalars.json')).read_text().splitlines()
        evaluated = [
            entry['running_mean']
            for entry in map(json.loads, log)
            if 'running_mean' in entry
        ]
        saved = {
            path.stem: torch.load(path, weights_only=False)['state_dict']
            for path in work_dir.glob('*.pth')
        }
        means = {k: v['bn.running_mean'].item() for k, v in saved.items()}
        return evaluated, means

    return run


def running_mean(iterations: int) -> float:
    """Of the average input, 2, from 0 with momentum 1/2."""
    return 2 * (1 - 0.5**iterations)


def test_epochs(train):
    evaluated, saved = train('SyncBuffersBeforeSaveHook', BY_EPOCH, interval=1)
    # Eight images, two processes with two each: two iterations an epoch.
    expected = [running_mean(2), running_mean(4)]
    assert evaluated == pytest.approx(expected)
    assert saved == pytest.approx(dict(zip(('epoch_1', 'epoch_2'), expected)))


def test_iterations(train):
    evaluated, saved = train(
        'SyncBuffersBeforeSaveHook', BY_ITERATION, by_epoch=False, interval=2
    )
    expected = [running_mean(2), running_mean(3)]
    assert evaluated == pytest.approx(expected)
    # The last one is saved regardless of the interval.
    assert saved == pytest.approx(dict(zip(('iter_2', 'iter_3'), expected)))


def test_evaluation_without_saving(train):
    evaluated, saved = train(
        'SyncBuffersBeforeSaveHook',
        BY_ITERATION,
        by_epoch=False,
        interval=-1,
        save_last=False,
        save_best='running_mean',
        rule='greater',
    )
    assert evaluated == pytest.approx([running_mean(2), running_mean(3)])
    assert list(saved.values()) == pytest.approx([running_mean(3)])


def test_mmengine_saves_another_model_than_it_evaluates(train):
    """Why the hook is there; if this fails, MMEngine's own one does."""
    evaluated, saved = train(
        'SyncBuffersHook', BY_ITERATION, by_epoch=False, interval=2
    )
    assert saved['iter_2'] != pytest.approx(evaluated[0])

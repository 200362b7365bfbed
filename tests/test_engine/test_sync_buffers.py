# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Two real processes, each with its own data, so that their statistics differ."""

import json

import pytest
import torch

# A BatchNorm gets the input 1 on the first process and 3 on the second. The metric is
# its running mean in an evaluation. The script makes all runs of SETTINGS, and counts
# how often our hook averages over the processes.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import METRICS
from mmengine.runner import Runner
from mlla_mm.engine import launch
from mlla_mm.reproducible import running_statistics
from tests.test_engine.test_sync_buffers import SETTINGS


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


def average(*args, **kwargs):
    averages.append(1)
    all_reduce_params(*args, **kwargs)


all_reduce_params = running_statistics.all_reduce_params
running_statistics.all_reduce_params = average
cfg = Config(dict(model=dict(), launcher='pytorch'))
launch.set_up(cfg)
for name, (hook, train_cfg, checkpoint) in SETTINGS.items():
    averages = []
    work_dir = Path(sys.argv[1]) / name
    runner = Runner(
        model=Model(), launcher='pytorch', cfg=cfg, work_dir=str(work_dir),
        experiment_name=name, default_scope='mmengine',
        train_dataloader=loader(2), val_dataloader=loader(1),
        train_cfg=train_cfg, val_cfg=dict(), val_evaluator=dict(type='Metric'),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.0)),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', **checkpoint)),
        custom_hooks=[dict(type=hook)],
    )
    runner.train()
    if get_rank() == 0:
        (work_dir / 'averages.json').write_text(json.dumps(len(averages)))
launch.tear_down()
"""

OURS = 'SyncBuffersBeforeSaveHook'
BY_EPOCH = dict(by_epoch=True, max_epochs=2, val_interval=1)
BY_ITERATION = dict(type='IterBasedTrainLoop', max_iters=3, val_interval=2)
FIRST = dict(
    type='SeededIterBasedTrainLoop',
    max_iters=3,
    val_interval=2,
    running_statistics='first',
)
BEST_ALONE = dict(
    by_epoch=False,
    interval=-1,
    save_last=False,
    save_best='running_mean',
    rule='greater',
)
SETTINGS = {
    'epochs': (OURS, BY_EPOCH, dict(interval=1)),
    'iterations': (OURS, BY_ITERATION, dict(by_epoch=False, interval=2)),
    'evaluation without saving': (OURS, BY_ITERATION, BEST_ALONE),
    'first process': (OURS, FIRST, dict(by_epoch=False, interval=2)),
    "MMEngine's": ('SyncBuffersHook', BY_ITERATION, dict(by_epoch=False, interval=2)),
}


@pytest.fixture(scope='module')
def runs(run_tool, tmp_path_factory):
    """Running means evaluated and saved, and the number of averages, by setting."""
    folder = tmp_path_factory.mktemp('runs')
    script = folder / 'script.py'
    script.write_text(SCRIPT)
    run_tool('python', script, folder, processes=2)
    results = {}
    for name in SETTINGS:
        (log,) = (folder / name).glob('*/vis_data/scalars.json')
        entries = map(json.loads, log.read_text().splitlines())
        evaluated = [e['running_mean'] for e in entries if 'running_mean' in e]
        weights = {
            path.stem: torch.load(path, weights_only=False)['state_dict']
            for path in (folder / name).glob('*.pth')
        }
        saved = {key: x['bn.running_mean'].item() for key, x in weights.items()}
        averages = json.loads((folder / name / 'averages.json').read_text())
        results[name] = evaluated, saved, averages
    return results


def running_mean(iterations: int, mean: float = 2) -> float:
    """The running mean for a mean input; it starts at 0, with momentum 1/2."""
    return mean * (1 - 0.5**iterations)


def test_epochs(runs):
    evaluated, saved, averages = runs['epochs']
    # Eight images, two processes with two each: two iterations an epoch.
    expected = [running_mean(2), running_mean(4)]
    assert evaluated == pytest.approx(expected)
    assert saved == pytest.approx(dict(zip(('epoch_1', 'epoch_2'), expected)))
    assert averages == 2


def test_iterations(runs):
    evaluated, saved, averages = runs['iterations']
    expected = [running_mean(2), running_mean(3)]
    assert evaluated == pytest.approx(expected)
    # The last one is saved regardless of the interval.
    assert saved == pytest.approx(dict(zip(('iter_2', 'iter_3'), expected)))
    # The saved model is the evaluated one.
    assert averages == 2


def test_evaluation_without_saving(runs):
    evaluated, saved, averages = runs['evaluation without saving']
    assert evaluated == pytest.approx([running_mean(2), running_mean(3)])
    assert list(saved.values()) == pytest.approx([running_mean(3)])
    assert averages == 2


def test_statistics_of_the_first_process(runs):
    evaluated, saved, averages = runs['first process']
    expected = [running_mean(2, mean=1), running_mean(3, mean=1)]
    assert evaluated == expected
    assert saved == dict(zip(('iter_2', 'iter_3'), expected))
    # Averaging equal values could round them.
    assert averages == 0


def test_mmengine_saves_another_model_than_it_evaluates(runs):
    """The reason for our hook. If this test fails, MMEngine's hook suffices."""
    evaluated, saved, _ = runs["MMEngine's"]
    assert saved['iter_2'] != pytest.approx(evaluated[0])

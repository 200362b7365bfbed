# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Real runs of MMEngine's runner on a tiny model, stopped by real signals."""

import multiprocessing
import os
import signal
import subprocess
import time
from functools import partial
from threading import Thread

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import METRICS
from mmengine.runner import FlexibleRunner, Runner
from torch import nn
from torch.utils.data import DataLoader

from mlla_mm.reproducible import Preempted
from mlla_mm.reproducible.preemption import shield_workers
from mlla_mm.reproducible.resume import newest_checkpoint

UPDATES = 5
"""Number of updates of an epoch."""

SEED = 1


class Tiny(BaseModel):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1)
        )

    def forward(self, inputs, mode):
        outputs = self.layers(inputs)
        if mode == 'loss':
            return dict(loss=outputs.square().mean())
        return list(outputs.detach())


@METRICS.register_module()
class MeanOutput(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += [output.item() for output in data_samples]

    def compute_metrics(self, results):
        return dict(mean=sum(results) / len(results))


class Recorder(Hook):
    """Updates with their rates, seeds and images; ends of epochs; evaluations."""

    def __init__(self, record):
        self.record = record

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        rate = runner.optim_wrapper.get_lr()['lr']
        batches = data_batch if isinstance(data_batch, list) else [data_batch]
        images = [x for batch in batches for x in batch['inputs'].flatten().tolist()]
        seed = torch.initial_seed()
        self.record.append((runner.epoch, runner.iter, batch_idx, rate, seed, images))

    def after_train_epoch(self, runner):
        self.record.append(('end of epoch', runner.epoch, runner.iter))

    def after_val_epoch(self, runner, metrics=None):
        self.record.append(('evaluation', runner.iter, metrics))


class Stopper(Hook):
    """Sends SIGTERM in an update, or in an evaluation after an update."""

    def __init__(self, update=None, evaluation_after=None, in_start=False):
        self.update = update
        self.evaluation_after = evaluation_after
        self.in_start = in_start

    def before_train(self, runner):
        if self.in_start:
            os.kill(os.getpid(), signal.SIGTERM)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.update:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.evaluation_after and batch_idx == 0:
            os.kill(os.getpid(), signal.SIGTERM)


class Between(Hook):
    """Sends SIGTERM between two updates: while a checkpoint is saved, say."""

    priority = 'LOWEST'

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Average(Hook):
    """Has buffers of its own. Its attribute ``ema`` is not that of MESAHook."""

    ema = None

    def before_train(self, runner):
        self.value = torch.zeros(1)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.value += data_batch['inputs'].mean()

    def own_buffers(self):
        return [self.value]


EPOCHS = dict(
    train_cfg=dict(type='SeededEpochBasedTrainLoop', max_epochs=3),
    sampler=dict(type='DefaultSampler', shuffle=True),
    checkpoint=dict(interval=1, by_epoch=True),
)
ITERATIONS = dict(
    train_cfg=dict(type='SeededIterBasedTrainLoop', max_iters=13, val_interval=4),
    sampler=dict(type='InfiniteSampler', shuffle=True),
    checkpoint=dict(interval=4, by_epoch=False, max_keep_ckpts=1),
)


def train(folder, record, stopper=None, flexible=False, **setting):
    """Train, from the newest checkpoint if there is one. A hook fills the record."""
    number = setting.get('images', 2 * UPDATES)
    images = torch.rand(number, 2, generator=torch.Generator().manual_seed(0))
    dataset = [dict(inputs=image) for image in images]
    loader = dict(
        batch_size=2, dataset=dataset, collate_fn=dict(type='default_collate')
    )
    torch.manual_seed(0)
    newest = newest_checkpoint(folder)
    kind = FlexibleRunner if flexible else Runner
    runner = kind(
        model=Tiny(),
        work_dir=str(folder),
        train_dataloader=dict(sampler=setting['sampler'], **loader),
        train_cfg=setting['train_cfg'],
        val_dataloader=dict(
            sampler=dict(type='DefaultSampler', shuffle=False), **loader
        ),
        val_cfg=dict(),
        val_evaluator=dict(type='MeanOutput'),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
        param_scheduler=[
            dict(type='ExponentialLR', gamma=0.9, by_epoch=False),
            dict(type='ExponentialLR', gamma=0.5, by_epoch=True),
        ],
        default_hooks=dict(
            checkpoint=dict(
                type='WholeCheckpointHook',
                save_best='mean',
                rule='less',
                **setting['checkpoint'],
            )
        ),  # fmt: skip
        custom_hooks=[
            dict(type='PreemptionHook'),
            *setting.get('hooks', []),
            Recorder(record),
            *([stopper] if stopper else []),
        ],
        default_scope='mmengine',
        randomness=dict(seed=SEED),
        experiment_name=os.urandom(4).hex(),
        resume=newest is not None,
        load_from=newest and str(newest),
        **setting.get('more', {}),
    )
    runner.train()


def contents(folder):
    """The parts of the newest checkpoint that a resumed run depends on."""
    checkpoint = torch.load(newest_checkpoint(folder), weights_only=False)
    tensors = {
        **checkpoint['state_dict'],
        **{
            f'momentum {i}': state['momentum_buffer']
            for i, state in checkpoint['optimizer']['state'].items()
        },
        **checkpoint.get('ema_state_dict', {}),
    }
    rest = {key: checkpoint['meta'][key] for key in ('epoch', 'iter', 'seed')}
    best = checkpoint['message_hub']['runtime_info'].get('best_score')
    rest.update(best=best, schedulers=checkpoint['param_schedulers'])
    return tensors, rest


EMA = dict(type='EMAHook', momentum=0.1)


@pytest.mark.parametrize(
    ('setting', 'stops'),
    [
        # In the first update of an epoch, within it, and in the last. A signal takes
        # effect before the next update.
        (EPOCHS, [Stopper(5), Stopper(7), Stopper(9)]),
        (EPOCHS, [Stopper(evaluation_after=5), Stopper(evaluation_after=10)]),
        # Twice in the last evaluation.
        (EPOCHS, [Stopper(evaluation_after=15), Stopper(evaluation_after=15)]),
        # During an evaluation the model has the weights of MMEngine's average.
        ({**EPOCHS, 'hooks': [EMA]}, [Stopper(6), Stopper(evaluation_after=10)]),
        (ITERATIONS, [Stopper(2), Stopper(3), Stopper(evaluation_after=8)]),
        # In the second pass over the data; a third follows, in another order.
        (
            {**ITERATIONS, 'sampler': EPOCHS['sampler']},
            [Stopper(7), Stopper(evaluation_after=8), Stopper(8)],
        ),
        ({**ITERATIONS, 'hooks': [EMA]}, [Stopper(6), Stopper(evaluation_after=12)]),
    ],
)
def test_a_stopped_run_ends_as_if_it_had_not_been(
    tmp_path, monkeypatch, setting, stops
):
    # MMEngine waits two seconds between passes for workers. This run has none.
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    before = signal.getsignal(signal.SIGTERM)
    expected, found = [], []
    train(tmp_path / 'whole', expected, **setting)
    assert signal.getsignal(signal.SIGTERM) is before
    for stopper in stops:
        with pytest.raises(Preempted):
            train(tmp_path / 'stopped', found, stopper, **setting)
        signal.signal(signal.SIGTERM, before)
    train(tmp_path / 'stopped', found, **setting)
    assert found == expected
    (tensors, rest), (expected_tensors, expected_rest) = (
        contents(tmp_path / name) for name in ('stopped', 'whole')
    )
    assert rest == expected_rest
    assert tensors.keys() == expected_tensors.keys()
    for key, value in expected_tensors.items():
        assert torch.equal(tensors[key], value), key
    names = [
        {path.name for path in (tmp_path / name).glob('*.pth')}
        for name in ('stopped', 'whole')
    ]
    assert names[0] == names[1]


# One of two processes gets SIGTERM: in an update, then in an evaluation. Their images
# differ, and so do their BatchNorm statistics.
SCRIPT = """
import copy
import sys
from pathlib import Path
import torch
from mmengine.config import Config
from mmengine.dist import barrier, get_rank
from mlla_mm.engine import launch
from mlla_mm.reproducible import Preempted
from tests.test_reproducible.test_preemption import (
    EPOCHS, Average, Stopper, contents, train,
)


def check_buffers(folder, rule):
    (path,) = folder.glob('preempted_iter_*.pth')
    saved = torch.load(path, weights_only=False)
    means = [value for key, value in saved['state_dict'].items() if 'running' in key]
    parts = [[x for x in part if x.ndim] for part in saved['process_buffers']]
    for mean, one, other in zip(means, *parts):
        torch.testing.assert_close(mean, (one + other) / 2)
        # Before an evaluation they have been made alike.
        alike = rule == 'first' or saved['meta']['iter'] == 6
        assert torch.equal(one, other) == alike


cfg = Config(dict(
    launcher='pytorch', model=dict(), env_cfg=dict(dist_cfg=dict(timeout=30))
))
launch.set_up(cfg)
for rule in ('mean', 'first'):
    folder = Path(sys.argv[1]) / rule
    average = Average()
    setting = {
        **copy.deepcopy(EPOCHS),
        'images': 12,
        'hooks': [dict(type='SyncBuffersBeforeSaveHook'), average],
        'more': dict(launcher='pytorch', cfg=cfg),
    }
    setting['train_cfg']['running_statistics'] = rule
    expected, found = [], []
    train(folder / 'whole', expected, **setting)
    expected_average = average.value
    for stopper in (Stopper(3), Stopper(evaluation_after=6)):
        hook = stopper if get_rank() == 1 else None
        try:
            train(folder / 'stopped', found, hook, **setting)
        except Preempted:
            if get_rank() == 0:
                check_buffers(folder / 'stopped', rule)
            barrier()  # the first process alone saves
        else:
            raise AssertionError('not stopped')
    train(folder / 'stopped', found, **setting)
    assert found == expected, (found, expected)
    assert torch.equal(average.value, expected_average)
    if get_rank() == 0:
        (tensors, rest), (expected_tensors, expected_rest) = (
            contents(folder / name) for name in ('stopped', 'whole')
        )
        assert rest == expected_rest
        for key, value in expected_tensors.items():
            assert torch.equal(tensors[key], value), key
launch.tear_down()
"""


@pytest.mark.parametrize('setting', [EPOCHS, ITERATIONS], ids=['epochs', 'iterations'])
def test_a_flexible_runner_goes_on_with_the_next_update(tmp_path, setting):
    """A config with a ``strategy``, such as FSDP, uses this runner."""
    ends = {}
    for name, stops in {'whole': [], 'stopped': [2, 7]}.items():
        record = []
        run = partial(train, tmp_path / name, record, flexible=True, **setting)
        for update in stops:
            with pytest.raises(Preempted):
                run(stopper=Stopper(update))
        run()
        ends[name] = record, contents(tmp_path / name)
    assert ends['stopped'][0] == ends['whole'][0]
    (found, _), (expected, _) = ends['stopped'][1], ends['whole'][1]
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_a_signal_to_one_process_stops_all(run_tool, tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    run_tool('python', tmp_path / 'script.py', tmp_path, processes=2)


@pytest.mark.parametrize('setting', [EPOCHS, ITERATIONS], ids=['epochs', 'iterations'])
@pytest.mark.parametrize('loop, saved', [('ours', 3), ('MMEngine', 2)])
def test_a_signal_between_two_updates(tmp_path, setting, loop, saved):
    """It counts for the next one of our loops, and at once for MMEngine's."""
    before = signal.getsignal(signal.SIGTERM)
    if loop == 'MMEngine':
        kind = setting['train_cfg']['type'].replace('Seeded', '')
        setting = {**setting, 'train_cfg': dict(setting['train_cfg'], type=kind)}
    with pytest.raises(Preempted):
        train(tmp_path, [], Between(), **setting)
    signal.signal(signal.SIGTERM, before)
    assert newest_checkpoint(tmp_path).name == f'preempted_iter_{saved}.pth'


@pytest.mark.parametrize('setting', [EPOCHS, ITERATIONS], ids=['epochs', 'iterations'])
def test_a_stopped_runner_may_train_again(tmp_path, setting):
    class Keep(Stopper):
        def before_run(self, runner):
            self.runner = runner

    before = signal.getsignal(signal.SIGTERM)
    record, stopper = [], Keep(2)
    with pytest.raises(Preempted):
        train(tmp_path, record, stopper, **setting)
    signal.signal(signal.SIGTERM, before)
    stopper.runner.train()
    assert [entry[1] for entry in record if len(entry) == 6][:5] == [0, 1, 2, 3, 4]


def test_nothing_is_saved_before_the_first_update(tmp_path, caplog):
    before = signal.getsignal(signal.SIGTERM)
    record = []
    with pytest.raises(Preempted):
        train(tmp_path / 'work', record, Stopper(in_start=True), **EPOCHS)
    signal.signal(signal.SIGTERM, before)
    assert not record
    assert newest_checkpoint(tmp_path / 'work') is None


def test_the_message_names_the_checkpoint(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted):
        train(tmp_path / 'work', [], Stopper(6), **EPOCHS)
    signal.signal(signal.SIGTERM, before)
    path = tmp_path / 'work' / 'preempted_iter_7.pth'
    (log,) = (tmp_path / 'work').glob('*/*.log')
    assert f'after update 7: saved in {path}. Go on with --resume.' in log.read_text()
    assert (tmp_path / 'work' / 'last_checkpoint').read_text() == str(path)


def test_a_signal_in_the_last_update_lets_the_training_finish(tmp_path):
    setting = {**EPOCHS, 'train_cfg': dict(EPOCHS['train_cfg'], val_begin=4)}
    train(tmp_path / 'work', [], Stopper(14), **setting)
    assert newest_checkpoint(tmp_path / 'work').name == 'epoch_3.pth'


@pytest.mark.parametrize('setting', [EPOCHS, ITERATIONS], ids=['epochs', 'iterations'])
def test_a_training_that_fails_leaves_the_signal_as_it_was(tmp_path, setting):
    class Failure(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            assert signal.getsignal(signal.SIGTERM) is not before
            raise KeyError('mine')

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError, match='mine'):
        train(tmp_path, [], Failure(), **setting)
    assert signal.getsignal(signal.SIGTERM) is before


def test_training_in_another_thread(tmp_path):
    """There the hook cannot handle signals."""
    record = []
    thread = Thread(target=train, args=(tmp_path, record), kwargs=EPOCHS)
    thread.start()
    thread.join()
    assert ('end of epoch', 2, 15) in record


def test_an_epoch_of_another_length_begins_anew(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    record = []
    with pytest.raises(Preempted):
        train(tmp_path / 'work', record, Stopper(6), **EPOCHS)
    signal.signal(signal.SIGTERM, before)
    path = tmp_path / 'work' / 'preempted_iter_7.pth'
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['message_hub']['runtime_info']['epoch_begun']['updates'] = 8
    torch.save(checkpoint, path)
    record.clear()
    train(tmp_path / 'work', record, **EPOCHS)
    assert record[0][:3] == (1, 7, 0)
    (*_, log) = sorted((tmp_path / 'work').glob('*/*.log'))
    assert 'Epoch 2 begins anew: it has 5 updates, but 8' in log.read_text()


def test_workers_obey_their_parent_alone():
    shield_workers()
    others = set(multiprocessing.active_children())
    loader = DataLoader(torch.arange(8), num_workers=1, persistent_workers=True)
    assert len(list(loader)) == 8
    (worker,) = set(multiprocessing.active_children()) - others
    subprocess.run(['kill', '-TERM', str(worker.pid)], check=True)
    time.sleep(0.5)
    assert len(list(loader)) == 8
    assert worker.is_alive()
    worker.terminate()
    worker.join(timeout=60)
    assert worker.exitcode == 0

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Runs of the demos that are killed again and again, beside one that is not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

from mlla_mm.datasets.digits import make_ade20k, make_coco, make_imagenet

from ..processes import ROOT
from .test_resume import assert_same_end

CLASSIFICATION = 'configs/classification/mlla-nano_digits.py'
SEGMENTATION = 'configs/segmentation/upernet_mlla-nano_digits.py'
DETECTION = 'configs/detection/mask-rcnn_mlla-nano_fpn_digits.py'


class Task(NamedTuple):
    """A demo that saves 16 to 20 checkpoints, some of them before a validation."""

    config: str
    make_data: callable
    images: int
    size: int
    options: dict


TASKS = {
    # The teacher starts after a quarter of the epochs.
    'classification': Task(
        CLASSIFICATION,
        make_imagenet,
        40,
        32,
        {
            'train_dataloader.batch_size': 8,
            'model.backbone.drop_path_rate': 0.2,
            'param_scheduler.warmup': 1,
            'param_scheduler.end': 16,
            'train_cfg.max_epochs': 16,
            'train_cfg.val_interval': 4,
            'default_hooks.checkpoint.max_keep_ckpts': 3,
        },
    ),
    'segmentation': Task(
        SEGMENTATION,
        make_ade20k,
        6,
        48,
        {
            'train_cfg.max_iters': 60,
            'train_cfg.val_interval': 6,
            'default_hooks.checkpoint.interval': 3,
        },
    ),
    'detection': Task(
        DETECTION,
        make_coco,
        8,
        64,
        {
            'train_dataloader.batch_size': 2,
            'train_cfg.max_epochs': 20,
            'train_cfg.val_interval': 4,
            'param_scheduler.1.end': 20,
        },
    ),
}


@pytest.fixture(scope='module')
def command(tmp_path_factory):
    """Makes the data of a demo, and returns its training command without work_dir."""

    def make(name: str) -> list:
        task = TASKS[name]
        folder = tmp_path_factory.mktemp('data') / name
        data = task.make_data(folder, train=task.images, val=4, size=task.size)
        options = {'default_hooks.logger.interval': 1, **task.options}
        options['allow_empty_classes'] = True  # some digits are in none of the images
        for split in ('train', 'val'):
            options[f'{split}_dataloader.dataset.data_root'] = f'{data}/'
        if name == 'detection':
            annotations = f'{data}/annotations/instances_val.json'
            options['val_evaluator.ann_file'] = annotations
        return [
            sys.executable, 'tools/train.py', task.config, '--seed', '3',
            '--resume', 'auto', '--cfg-options',
            *(f'{key}={value}' for key, value in options.items()),
        ]  # fmt: skip

    return make


class Run:
    """One start of a run, in a session of its own. A file has its output."""

    def __init__(self, command: list, work_dir: Path, log: Path) -> None:
        self.work_dir = work_dir
        self.log = log
        with log.open('w') as output:
            self.process = subprocess.Popen(
                [*command, f'work_dir={work_dir}'],
                cwd=ROOT,
                env={
                    **os.environ,
                    'PYTHONPATH': str(ROOT),
                    'OMP_NUM_THREADS': '1',
                    'CUDA_VISIBLE_DEVICES': '',
                },
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self, number: int) -> int:
        """Send a signal to all processes, and return the exit status of the run."""
        os.killpg(self.process.pid, number)
        return self.finish()

    def finish(self) -> int:
        status = self.process.wait(timeout=1800)
        deadline = time.monotonic() + 30
        while left := list(self.processes()):
            assert time.monotonic() < deadline, f'processes left: {left}'
            time.sleep(0.1)
        return status

    def processes(self) -> Iterator[int]:
        """The processes of the session that have not ended."""
        for folder in Path('/proc').glob('[0-9]*'):
            try:
                # After the name, in brackets: state, parent, group, session.
                fields = (folder / 'stat').read_text().rpartition(')')[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) == self.process.pid and fields[0] != 'Z':
                yield int(folder.name)

    def trains(self) -> bool:
        return 'Checkpoints will be saved to' in self.log.read_text()

    def is_saving(self) -> bool:
        return any(self.work_dir.glob('.*.pth.part'))

    def wait_for(self, happens) -> bool:
        """Wait until something happens; False if the run ends before."""
        while self.process.poll() is None:
            if happens():
                return True
            time.sleep(0.0005)
        return False


@pytest.mark.slow
def test_a_run_that_is_stopped_twice(command, tmp_path):
    """In an epoch, by a signal to its workers too, and then at its start."""
    name = 'classification'
    arguments = [*command(name), 'train_cfg.max_epochs=3', 'train_cfg.val_interval=3']
    expected = Run(arguments, tmp_path / 'expected', tmp_path / 'expected.log')
    assert expected.finish() == 0, expected.log.read_text()[-4000:]
    work_dir = tmp_path / 'stopped'
    run = Run(arguments, work_dir, tmp_path / 'first.log')
    assert run.wait_for(lambda: 'Epoch(train) [2][1/5]' in run.log.read_text())
    assert run.kill(signal.SIGTERM) == 143, run.log.read_text()[-4000:]
    (stopped,) = work_dir.glob('preempted_iter_*.pth')
    log = run.log.read_text()
    assert f'saved in {stopped}. Go on with --resume.' in log
    assert 'Traceback' not in log
    run = Run(arguments, work_dir, tmp_path / 'second.log')
    assert run.wait_for(run.trains)
    assert run.kill(signal.SIGTERM) == 143, run.log.read_text()[-4000:]
    run = Run(arguments, work_dir, tmp_path / 'third.log')
    assert run.finish() == 0, run.log.read_text()[-4000:]
    assert_same_end(work_dir, tmp_path / 'expected')


# How often a run is killed at each kind of moment: while it starts, some updates later,
# while it writes a checkpoint. The signal is SIGKILL, or SIGTERM for names with TERM.
KILLS = {'start': 3, 'updates': 5, 'save': 6, 'TERM in start': 2, 'TERM': 6}


class Killer:
    """Kills a run at random moments.

    Args:
        command (list): Starts the run.
        folder (Path): For the work_dir and logs.
        seed (int): Of the moments.
    """

    def __init__(self, command: list, folder: Path, seed: int) -> None:
        self.command = command
        self.folder = folder
        self.work_dir = folder / 'killed'
        self.random = random.Random(seed)
        self.start_up = 5.0
        self.lives = 0
        self.count = Counter()

    def run(self) -> Counter:
        """Kill as :data:`KILLS` says, then let the run finish.

        Returns:
            Counter: Number of all kills and by kind, ``saves`` of them while a
            checkpoint was written, and ``stops``, with a checkpoint saved in time.
        """
        kinds = [kind for kind, number in KILLS.items() for _ in range(number)]
        self.random.shuffle(kinds)
        for kind in kinds:
            self.live(kind)
        run = self.start()
        assert run.finish() == 0, run.log.read_text()[-4000:]
        return self.count

    def start(self) -> Run:
        self.lives += 1
        return Run(self.command, self.work_dir, self.folder / f'life_{self.lives}.log')

    def live(self, kind: str) -> None:
        began = time.monotonic()
        run = self.start()
        if kind.endswith('start'):
            time.sleep(self.random.uniform(0, self.start_up))
        else:
            assert run.wait_for(run.trains), run.log.read_text()[-4000:]
            self.start_up = time.monotonic() - began
            if kind == 'save':
                # The second proves that the first was completed.
                for _ in range(self.random.choice((1, 2))):
                    run.wait_for(lambda: not run.is_saving())
                    run.wait_for(run.is_saving)
            else:
                updates = self.random.randint(1, 6)
                run.wait_for(lambda: run.log.read_text().count('(train) ') >= updates)
                time.sleep(self.random.uniform(0, 0.3))
        assert run.process.poll() is None, run.log.read_text()[-4000:]
        number = signal.SIGTERM if 'TERM' in kind else signal.SIGKILL
        self.judge(kind, run, run.kill(number))

    def judge(self, kind: str, run: Run, status: int) -> None:
        log = run.log.read_text()
        if status == -signal.SIGKILL:
            self.count['saves'] += run.is_saving()
        elif 'Stopped by SIGTERM' in log:
            assert status == 143, (status, log[-4000:])
            assert 'Traceback' not in log, log[-4000:]
            self.count['stops'] += 'saved in' in log
        else:
            # Before the training began.
            assert kind.startswith('TERM') and status == -signal.SIGTERM, log[-4000:]
        self.count['kills'] += 1
        self.count[kind] += 1


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks into /proc')
@pytest.mark.parametrize('name', TASKS)
def test_a_run_that_is_killed_20_times(name, command, tmp_path):
    arguments = command(name)
    expected = Run(arguments, tmp_path / 'expected', tmp_path / 'expected.log')
    assert expected.finish() == 0, expected.log.read_text()[-4000:]
    count = Killer(arguments, tmp_path, seed=len(name)).run()
    print(f'{name}: {json.dumps(count)}')
    assert count['kills'] >= 20 and count['saves'] and count['stops']
    assert_same_end(tmp_path / 'killed', tmp_path / 'expected')
    left = [path.name for path in (tmp_path / 'killed').glob('*preempted*')]
    assert not left + list((tmp_path / 'killed').glob('.*.part'))

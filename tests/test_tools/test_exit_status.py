# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What tools/train.py tells a cluster's scripts when it ends."""

import pytest
from mmengine.config import Config

from mlla_mm.datasets.digits import make_imagenet

from ..processes import ROOT

pytest.importorskip('mmpretrain')


@pytest.fixture
def train(run_tool, tmp_path):
    """Train the demo's classifier on a few images, stopped in its second update."""
    data = make_imagenet(tmp_path / 'data', train=10, val=10, size=32)
    cfg = Config.fromfile(ROOT / 'configs/classification/mlla-nano_digits.py')
    for split in ('train', 'val'):
        loader = cfg[f'{split}_dataloader']
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(data)
    cfg.custom_imports.imports.append('tests.stopper')
    cfg.default_hooks.stop = dict(type='StopHook')
    cfg.dump(tmp_path / 'config.py')

    def run(work_dir, *options):
        command = ['python', 'tools/train.py', tmp_path / 'config.py', *options]
        return run_tool(*command, '--work-dir', work_dir, check=False)

    return run


def test_sigterm(train, tmp_path):
    result = train(tmp_path / 'work')
    # As a shell reports a process that the signal ended.
    assert result.returncode == 128 + 15, result.stdout
    assert (tmp_path / 'work' / 'preempted_iter_2.pth').is_file()


def test_rehearsal_of_a_run_that_would_fail(train, tmp_path):
    (tmp_path / 'file').write_text('')
    result = train(tmp_path / 'file' / 'work', '--check')
    assert result.returncode == 1
    assert 'check failed' in result.stdout

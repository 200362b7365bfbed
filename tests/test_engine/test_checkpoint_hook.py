# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Real runs of MMEngine's runner on a tiny model."""

import errno
import os

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner

from mlla_mm.utils import files


class Tiny(BaseModel):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, inputs, mode):
        return dict(loss=(self.weight - inputs).square().sum())


@pytest.fixture
def train(tmp_path):
    def run(**checkpoint) -> None:
        runner = Runner(
            Tiny(),
            str(tmp_path),
            train_dataloader=dict(
                batch_size=1,
                dataset=[dict(inputs=torch.ones(1))],
                sampler=dict(type='DefaultSampler', shuffle=False),
                collate_fn=dict(type='default_collate'),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=3),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            default_hooks=dict(
                checkpoint=dict(type='WholeCheckpointHook', interval=1, **checkpoint)
            ),
            default_scope='mmengine',
            experiment_name=f'{tmp_path.name}_{os.urandom(4).hex()}',
        )
        runner.train()

    return run


def names(folder) -> set:
    return {path.name for path in folder.glob('*.pth')}


def test_saves_and_removes_as_mmengine_does(train, tmp_path):
    train(max_keep_ckpts=2)
    assert names(tmp_path) == {'epoch_2.pth', 'epoch_3.pth'}
    assert not list(tmp_path.glob('.*'))
    saved = torch.load(tmp_path / 'epoch_3.pth', weights_only=False)
    assert saved['meta']['epoch'] == 3


def test_an_old_checkpoint_goes_after_the_new_one_is_there(
    train, tmp_path, monkeypatch
):
    seen = []
    write = files.write_whole

    def watch(path, content):
        seen.append(names(tmp_path))
        write(path, content)

    monkeypatch.setattr('mlla_mm.engine.hooks.checkpoint.write_whole', watch)
    train(max_keep_ckpts=1)
    # While the second and the third are written, the one before is still there.
    assert seen == [set(), {'epoch_1.pth'}, {'epoch_2.pth'}]
    assert names(tmp_path) == {'epoch_3.pth'}


def test_a_full_disk(train, tmp_path, monkeypatch):
    """Room for two checkpoints and a part of the third."""
    replace = files.Path.replace

    def full(self, target):
        if target.name == 'epoch_3.pth':
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    monkeypatch.setattr(files.Path, 'replace', full)
    with pytest.raises(OSError, match='epoch_3.pth was not saved .No space left') as e:
        train(max_keep_ckpts=1)
    assert e.value.errno == errno.ENOSPC
    assert names(tmp_path) == {'epoch_2.pth'}
    torch.load(tmp_path / 'epoch_2.pth', weights_only=False)
    assert not list(tmp_path.glob('.*'))


def test_what_a_killed_process_left_is_removed(train, tmp_path):
    part = files.part_of(tmp_path / 'epoch_7.pth')
    part.write_bytes(b'half a checkpoint')
    train()
    assert not part.exists()

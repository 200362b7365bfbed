# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import hashlib
import re

import pytest
import torch

from mlla_mm.checkpoints.publish import publish
from mlla_mm.checkpoints.reader import CheckpointError, load_checkpoint_file
from mlla_mm.models import MLLA

from .. import checkpoints

ARCH = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))


@pytest.fixture
def training(tmp_path):
    """A training checkpoint of ours: plain weights of 0, averaged ones of 1."""
    state = checkpoints.prefixed(MLLA(ARCH).state_dict(), 'backbone.')
    path = tmp_path / 'epoch_3.pth'
    torch.save(
        dict(
            meta=dict(
                epoch=3,
                iter=30,
                mmengine_version='0.10.7',
                dataset_meta=dict(classes=('a', 'b')),
                cfg='print()',
                config='print()',
                hook_msgs=dict(best_ckpt='/home/me/secret.pth'),
                experiment_name='secret',
                seed=1,
            ),
            state_dict={**{k: v * 0 for k, v in state.items()}, 'head': torch.ones(1)},
            state_dict_ema={k: v * 0 + 1 for k, v in state.items()},
            optimizer=dict(state={0: torch.ones(99)}),
            message_hub={},
        ),
        path,
    )
    return path


def test_published_file(tmp_path, training):
    path = publish(training, tmp_path / 'new' / 'mlla.pth')
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path == tmp_path / 'new' / f'mlla-{digest[:8]}.pth'
    assert re.fullmatch(r'mlla-[0-9a-f]{8}', path.stem)
    content = load_checkpoint_file(path)
    source = load_checkpoint_file(training)
    assert set(content) == {'state_dict', 'meta'}
    # Neither a program that MMEngine would execute, nor what is nobody's business.
    assert content['meta'] == dict(
        epoch=3,
        iter=30,
        mmengine_version='0.10.7',
        dataset_meta=dict(classes=('a', 'b')),
    )
    assert list(content['state_dict']) == list(source['state_dict'])
    assert not content['state_dict']['backbone.norm0.weight'].any()
    # The same weights give the same name.
    assert publish(training, tmp_path / 'new' / 'mlla.pth') == path
    assert list(path.parent.iterdir()) == [path]
    averaged = publish(training, tmp_path / 'new' / 'mlla.pth', ema=True)
    assert averaged != path
    weights = load_checkpoint_file(averaged)['state_dict']
    assert weights['backbone.norm0.weight'].tolist() == [1] * 8


def test_a_file_that_cannot_be_written_leaves_none(tmp_path, training, monkeypatch):
    class Full(OSError):
        pass

    def fail(self, target):
        raise Full

    monkeypatch.setattr('pathlib.Path.replace', fail)
    with pytest.raises(Full):
        publish(training, tmp_path / 'new' / 'mlla.pth')
    assert not list((tmp_path / 'new').iterdir())


def test_errors(tmp_path, training):
    with pytest.raises(ValueError, match='must end in .pth, got .*mlla.pt'):
        publish(training, tmp_path / 'mlla.pt')
    with pytest.raises(FileNotFoundError, match='no.pth'):
        publish(tmp_path / 'no.pth', tmp_path / 'new.pth')
    torch.save({'conv': torch.ones(1)}, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match='other.pth holds no MLLA'):
        publish(tmp_path / 'other.pth', tmp_path / 'new.pth')
    with pytest.raises(CheckpointError, match='no averaged weights'):
        publish(tmp_path / 'other.pth', tmp_path / 'new.pth', ema=True)
    assert not list(tmp_path.glob('new*'))


def test_names_of_classes_of_older_toolboxes(tmp_path, training):
    content = load_checkpoint_file(training)
    content['meta'] = dict(CLASSES=('a',), PALETTE=[(1, 2, 3)], config='print()')
    torch.save(content, training)
    published = load_checkpoint_file(publish(training, tmp_path / 'new.pth'))
    assert published['meta'] == dict(CLASSES=('a',), PALETTE=[(1, 2, 3)])

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Real runs of MMEngine's runner on a tiny model."""

import errno
import os
import shutil

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from mmengine.runner import Runner

from mlla_mm.checkpoints.reader import CheckpointError
from mlla_mm.utils import files

from ..one_weight import OneWeight


@METRICS.register_module()
class Score(BaseMetric):
    """Two metrics that rise with every update."""

    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return dict(score=results[0], other=results[0] + 1)


@pytest.fixture
def train(tmp_path):
    def run(
        work_dir=tmp_path,
        kind='WholeCheckpointHook',
        hooks=(),
        resume=None,
        load_from=None,
        epochs=3,
        **checkpoint,
    ) -> Runner:
        loader = dict(
            batch_size=1,
            dataset=[dict(inputs=torch.ones(1))],
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        )
        runner = Runner(
            OneWeight(),
            str(work_dir),
            train_dataloader=loader,
            val_dataloader=loader,
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            val_cfg=dict(),
            val_evaluator=dict(type='Score'),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            default_hooks=dict(checkpoint=dict(type=kind, interval=1, **checkpoint)),
            custom_hooks=[dict(type=name) for name in hooks],
            default_scope='mmengine',
            experiment_name=f'{tmp_path.name}_{os.urandom(4).hex()}',
            resume=resume is not None,
            load_from=(resume or load_from) and str(resume or load_from),
        )
        runner.train()
        return runner

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


# Checkpoints whose state names files, and are then resumed.

# The hooks of our tools, with our checkpoint hook or MMEngine's. The last setting has
# our checkpoint hook alone, which removes and publishes its own files only.
PROTECTED = {
    'tools': dict(hooks=['ResumedStateHook']),
    "tools, MMEngine's hook": dict(hooks=['ResumedStateHook'], kind='CheckpointHook'),
    'hook alone': {},
}
BEST = dict(save_best='score', rule='greater')
of_tools = pytest.mark.parametrize('protected', list(PROTECTED)[:2], indirect=True)


@pytest.fixture(params=PROTECTED)
def protected(request):
    return PROTECTED[request.param]


@pytest.fixture(scope='module')
def untouched(tmp_path_factory):
    """The folder of a run of one epoch."""
    return tmp_path_factory.mktemp('untouched')


@pytest.fixture
def work(tmp_path, train, untouched):
    """Makes a work_dir with a checkpoint, and changes values in its state."""

    def make(checkpoint=None, **state):
        if not list(untouched.glob('*.pth')):
            train(untouched, epochs=1, **BEST)
        path = tmp_path / 'work' / 'epoch_1.pth'
        path.parent.mkdir(exist_ok=True)
        content = torch.load(untouched / path.name, weights_only=False)
        content['message_hub']['runtime_info'].update(state)
        content['meta'].update(checkpoint or {})
        torch.save(content, path)
        return path

    return make


@pytest.fixture
def others(tmp_path):
    """A folder that the run must not change."""
    folder = tmp_path / 'others'
    (folder / 'best_folder_epoch_1.pth').mkdir(parents=True)
    for name in ('thesis.txt', 'best_score_epoch_1.pth', 'epoch_1.pth'):
        (folder / name).write_text(name)
    (folder / 'best_folder_epoch_1.pth' / 'rank0.pth').write_text('weights')
    return folder


def tree(folder) -> dict:
    return {
        str(path.relative_to(folder)): path.is_file() and path.read_bytes()
        for path in folder.rglob('*')
    }


@pytest.mark.parametrize(
    'name',
    ['', 'thesis.txt', 'best_score_epoch_1.pth', 'best_folder_epoch_1.pth'],
)
@pytest.mark.parametrize('relative', [False, True])
def test_the_best_checkpoint_of_others_stays(
    train, work, others, protected, name, relative, monkeypatch
):
    named = others / name
    if relative:
        monkeypatch.chdir(others.parent)
        named = f'work/../others/{name}'
    before = tree(others)
    path = work(best_ckpt=str(named), last_ckpt=str(others / 'epoch_1.pth'))
    train(
        path.parent, resume=path, published_keys=['meta', 'state_dict'],
        **BEST, **protected,
    )  # fmt: skip
    assert tree(others) == before
    # The run still saves its own checkpoints.
    assert (path.parent / 'best_score_epoch_3.pth').is_file()


def test_best_checkpoints_of_several_metrics(train, work, others, protected):
    before = tree(others)
    path = work(
        best_ckpt_score=str(others), best_ckpt_other=str(others / 'epoch_1.pth')
    )
    several = dict(save_best=['score', 'other'], rule='greater')
    train(path.parent, resume=path, **several, **protected)
    assert tree(others) == before
    own = {'best_score_epoch_3.pth', 'best_other_epoch_3.pth'}
    assert own <= names(path.parent)


@of_tools
@pytest.mark.parametrize(
    'numbers',
    [
        ['../../../others/epoch_1', 1, 1, 1],
        [[1], {}, None, 1.0, True, -1, 2**70, 10**300, '1'],
        'epoch_1',
        {'1': 1},
        7,
        list(range(2000)),
    ],
)
def test_numbers_of_old_checkpoints_are_numbers(
    train, work, others, protected, numbers
):
    before = tree(others)
    path = work(keep_ckpt_ids=numbers)
    # Files that do not belong to the run.
    (path.parent / 'epoch_..').mkdir()
    for name in ('epoch_True.pth', 'epoch_1.0.pth', 'epoch_-1.pth', 'epoch_None.pth'):
        (path.parent / name).write_text('x')
    foreign = names(path.parent) - {'epoch_1.pth'}
    train(path.parent, resume=path, max_keep_ckpts=2, **protected)
    assert tree(others) == before
    assert names(path.parent) >= foreign | {'epoch_2.pth', 'epoch_3.pth'}


def test_links_and_folders_stay(train, work, others):
    """They have names of the run's checkpoints, but are none."""
    path = work(
        keep_ckpt_ids=[0, 1, 8, 9], best_ckpt='/elsewhere/best_score_epoch_1.pth'
    )
    own = path.parent
    (own / 'epoch_8.pth').mkdir()
    (own / 'epoch_8.pth' / 'rank0.pth').write_text('x')
    (own / 'epoch_9.pth').symlink_to(others / 'epoch_1.pth')
    (own / 'epoch_0.pth').symlink_to(others)
    (own / 'best_score_epoch_1.pth').symlink_to(others / 'thesis.txt')
    # MMEngine writes to the first. The hook removes the second as incomplete.
    (own / 'last_checkpoint').symlink_to(others / 'thesis.txt')
    (own / '.epoch_2.pth.part').symlink_to(others / 'thesis.txt')
    before = tree(others)
    train(own, resume=path, max_keep_ckpts=1, **BEST)
    assert tree(others) == before
    assert (own / 'epoch_8.pth' / 'rank0.pth').is_file()
    for name in ('epoch_0.pth', 'epoch_9.pth', 'best_score_epoch_1.pth'):
        assert (own / name).is_symlink()
    # The run's own file is removed, although it comes after the others in the list.
    assert not (own / 'epoch_1.pth').exists()
    assert (own / 'last_checkpoint').read_text() == str(own / 'epoch_3.pth')


def test_a_pipe_for_the_name_of_the_last_checkpoint(train, tmp_path):
    os.mkfifo(tmp_path / 'last_checkpoint')
    train(epochs=1)
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_1.pth')


@of_tools
def test_a_run_that_was_moved_has_its_best_checkpoint(train, work, protected):
    path = work(best_ckpt='/old/place/best_score_epoch_1.pth', best_score=0.1)
    moved = path.with_name('best_score_epoch_1.pth')
    moved.write_text('the best of its time')
    train(path.parent, resume=path, **BEST, **protected)
    assert names(path.parent) == {
        *('epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth', 'best_score_epoch_3.pth')
    }


def test_a_resumed_run_removes_its_old_checkpoints(train, work, protected):
    """Also with another max_keep_ckpts, and with the names of a filename_tmpl."""
    path = work(keep_ckpt_ids=[0, 1])
    path.with_name('model-000.pth').write_text('x')
    template = dict(filename_tmpl='model-{:03d}.pth', max_keep_ckpts=1)
    train(path.parent, resume=path, **template, **BEST, **protected)
    own = {'model-003.pth', 'best_score_model-003.pth'}
    assert names(path.parent) == {'epoch_1.pth', *own}


def test_published_checkpoints_are_the_runs(train, work, tmp_path, protected):
    shutil.copy(work(), tmp_path / 'best_score_epoch_1.pth')
    path = work(best_ckpt=str(tmp_path / 'best_score_epoch_1.pth'), best_score=9)
    train(path.parent, resume=path, published_keys='state_dict', **BEST, **protected)
    assert names(tmp_path) == {'best_score_epoch_1.pth'}
    (published,) = path.parent.glob('epoch_3-*.pth')
    assert list(torch.load(published, weights_only=False)) == ['state_dict']


@pytest.mark.parametrize(
    'meta, named',
    [
        (dict(epoch='1'), 'meta.epoch is missing'),
        (dict(iter=-1), 'meta.iter is missing'),
        (dict(epoch=True, iter=None), 'meta.epoch, meta.iter is missing'),
        (dict(seed='\x1b[2J'), r'its seed is \\x1b'),
        (dict(seed=2**32), 'its seed is 4294967296'),
    ],
)
def test_a_checkpoint_that_no_run_can_go_on_from(train, work, meta, named):
    path = work(checkpoint=meta)
    with pytest.raises(CheckpointError, match=named) as error:
        train(path.parent, resume=path, hooks=['ResumedStateHook'])
    assert 'epoch_1.pth cannot be resumed' in str(error.value)
    assert 'load_from' in str(error.value)
    assert names(path.parent) == {'epoch_1.pth'}


def test_a_published_checkpoint_cannot_be_resumed(train, work):
    path = work()
    torch.save(dict(state_dict=dict(weight=torch.ones(1))), path)
    with pytest.raises(CheckpointError, match='meta.epoch, .*message_hub.runtime_info'):
        train(path.parent, resume=path, hooks=['ResumedStateHook'])
    # A run can start from its weights.
    runner = train(path.parent, load_from=path, hooks=['ResumedStateHook'], epochs=1)
    assert runner.iter == 1


def test_logs_show_nothing_that_moves_the_cursor(train, work, capfd):
    path = work(**{'val/a\x1b[2J': 1, 'val/b': '\x1b[2J', 'c': '\u202e', 'own': 'd'})
    content = torch.load(path, weights_only=False)
    scalars = content['message_hub']['log_scalars']
    scalars['train/\x1b[2J'] = scalars['train/loss']
    content['message_hub']['resumed_keys']['\x1b[3J'] = True
    content['message_hub']['runtime_info'][7] = 8
    torch.save(content, path)
    runner = train(path.parent, resume=path, hooks=['ResumedStateHook'])
    assert '\x1b[2J' not in ''.join(capfd.readouterr())
    state = runner.message_hub.runtime_info
    assert state['own'] == 'd'
    assert not {'c', 7, 'val/b'} & set(state)

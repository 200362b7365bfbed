# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config

from mlla_mm.checkpoints.reader import CheckpointError
from mlla_mm.datasets.digits import make_imagenet
from mlla_mm.engine import options
from mlla_mm.reproducible import ResumedStateHook
from mlla_mm.reproducible.resume import keep_sound_state, newest_checkpoint, seed_of

from ..runs import logged, without_workers


def save(path: Path, seed=None, updates=0) -> Path:
    weights = dict(weight=torch.nn.Parameter(torch.zeros(3)))
    torch.save(dict(meta=dict(seed=seed, iter=updates), state_dict=weights), path)
    return path


def test_newest_checkpoint(tmp_path, caplog):
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path / 'best_coco_bbox_mAP_epoch_30.pth')
    assert newest_checkpoint(tmp_path) is None
    for number in (9, 10, 11, 12):
        save(tmp_path / f'epoch_{number}.pth')
    assert newest_checkpoint(tmp_path) == tmp_path / 'epoch_12.pth'
    # Damage two checkpoints: one is cut short, one is empty.
    whole = (tmp_path / 'epoch_12.pth').read_bytes()
    (tmp_path / 'epoch_12.pth').write_bytes(whole[:-100])
    (tmp_path / 'epoch_11.pth').write_bytes(b'')
    assert newest_checkpoint(tmp_path) == tmp_path / 'epoch_10.pth'


def test_the_checkpoint_of_a_stopped_run_is_one_of_them(tmp_path):
    for number in (9, 10):
        save(tmp_path / f'iter_{number}.pth')
    save(tmp_path / 'preempted_iter_9.pth')
    assert newest_checkpoint(tmp_path) == tmp_path / 'iter_10.pth'
    # Stopped in the evaluation after the same update.
    save(tmp_path / 'preempted_iter_10.pth')
    assert newest_checkpoint(tmp_path) == tmp_path / 'preempted_iter_10.pth'


@pytest.mark.parametrize('updates', [29, 30, 31])
def test_epochs_and_iterations_are_compared_by_updates(tmp_path, updates):
    epoch = save(tmp_path / 'epoch_3.pth', updates=30)
    stopped = save(tmp_path / f'preempted_iter_{updates}.pth', updates=updates)
    expected = epoch if updates < 30 else stopped
    assert newest_checkpoint(tmp_path) == expected
    stopped.write_bytes(stopped.read_bytes()[:-100])
    assert newest_checkpoint(tmp_path) == epoch


@pytest.mark.parametrize('epochs', [2, 3])
def test_fewer_updates_of_larger_batches_are_no_less_progress(tmp_path, epochs):
    """The run went on with twice the batch size after epoch 3."""
    epoch = save(tmp_path / 'epoch_3.pth', updates=30)
    meta = dict(epoch=epochs, iter=17)
    stopped = tmp_path / 'preempted_iter_17.pth'
    torch.save(dict(meta=meta, state_dict={}), stopped)
    assert newest_checkpoint(tmp_path) == (epoch if epochs < 3 else stopped)


def test_a_checkpoint_that_is_no_file_of_the_work_dir(tmp_path):
    """FSDP saves folders, and an out_dir may be elsewhere."""
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'elsewhere'))
    assert newest_checkpoint(tmp_path) is None
    (tmp_path / 'elsewhere').mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / 'elsewhere'


def test_pipes_are_no_checkpoints(tmp_path):
    """Opening a pipe would wait for ever."""
    pipe, pointer = tmp_path / 'epoch_9.pth', tmp_path / 'last_checkpoint'
    os.mkfifo(pipe)
    os.mkfifo(pointer)
    assert newest_checkpoint(tmp_path) is None
    pointer.unlink()
    pointer.write_text(str(pipe))
    assert newest_checkpoint(tmp_path) is None
    saved = save(tmp_path / 'epoch_3.pth')
    assert newest_checkpoint(tmp_path) == saved


@pytest.mark.parametrize('there', [False, True])
def test_a_moved_run_of_other_names(tmp_path, there):
    """MMEngine's last_checkpoint names the old path."""
    old, new = tmp_path / 'old', tmp_path / 'new'
    new.mkdir()
    saved = save(new / 'ck_4.pth')
    if there:  # it was copied
        old.mkdir()
        save(old / 'ck_4.pth')
    (new / 'last_checkpoint').write_text(str(old / 'ck_4.pth'))
    assert newest_checkpoint(new) == saved


@pytest.mark.parametrize(
    'content', [b'', b'\n', b'a\0b', bytes(range(256)), b'a' * 300, b'a/' * 10**6]
)
def test_what_does_not_name_a_checkpoint(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'last_checkpoint').write_bytes(content)
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize('seed', ['5', -1, 2**32, 1.0, True, [5]])
def test_a_seed_that_is_none(tmp_path, seed):
    path = save(tmp_path / 'iter_2.pth', seed=seed)
    with pytest.raises(CheckpointError, match='iter_2.pth cannot be resumed: its seed'):
        seed_of(path)


def test_updates_that_are_none(tmp_path):
    save(tmp_path / 'epoch_3.pth', updates='many')
    stopped = save(tmp_path / 'preempted_iter_1.pth', updates=1)
    assert newest_checkpoint(tmp_path) == stopped


def test_sound_state_is_kept():
    begun = dict(epoch=1, iter=10, updates=10)
    settings = dict(by_epoch=True, total_batch=16)
    sound = dict(
        best_score=np.float32(0.5), best_score_a=torch.tensor(1.0), best_score_b=3,
        epoch_begun=begun, training_settings=settings, validation_due=True,
        own=dict(a=[1]), text='words', no=None,
    )  # fmt: skip
    messages = dict(log_scalars={}, runtime_info=dict(sound), resumed_keys={})
    keep_sound_state(messages, updates=19)
    assert messages['runtime_info'] == sound
    unsound = [
        *(dict(best_score=x) for x in ('9', None, [1], torch.ones(2), float)),
        *(dict(epoch_begun=x) for x in (7, {}, dict(begun, iter=-9))),
        *(dict(epoch_begun=dict(begun, **x)) for x in (dict(iter=20), dict(epoch='1'))),
        *(dict(training_settings=x) for x in (3, {}, dict(settings, total_batch=-1))),
        dict(training_settings=dict(settings, by_epoch='yes')),
    ]
    for state in unsound:
        messages['runtime_info'] = state
        keep_sound_state(messages, updates=19)
        assert not state


def test_the_seed_is_the_interrupted_runs(tmp_path):
    save(tmp_path / 'iter_2.pth', seed=5)
    assert seed_of(tmp_path / 'iter_2.pth') == 5
    cfg = Config(
        dict(
            work_dir=str(tmp_path),
            randomness=dict(seed=1, diff_rank_seed=True),
            model=dict(),
        )
    )
    options.set_resume(cfg, 'auto')
    assert cfg.resume and cfg.load_from == str(tmp_path / 'iter_2.pth')
    assert cfg.randomness == dict(seed=5, diff_rank_seed=True)


def test_the_config_may_ask_to_resume(tmp_path, capsys):
    asking = dict(work_dir=str(tmp_path), resume=True, load_from=None, model=dict())
    asking = Config(asking)
    cfg = asking.copy()
    options.set_resume(cfg, None)
    assert not cfg.resume  # nothing there: a new run
    save(tmp_path / 'iter_2.pth', seed=5)
    options.set_resume(asking, None)
    assert asking.resume
    assert asking.load_from == str(tmp_path / 'iter_2.pth')
    assert capsys.readouterr() == ('', '')


def test_a_new_run_starts_from_the_configs_weights(tmp_path):
    cfg = Config(dict(work_dir=str(tmp_path), resume=False, load_from='w.pth'))
    options.set_resume(cfg, 'auto')
    assert not cfg.resume
    assert cfg.load_from == 'w.pth'


def assert_same_end(work_dir: Path, expected_dir: Path) -> None:
    """Compare weights, averages and moments bit by bit, and the state of the run."""
    path, expected_path = map(newest_checkpoint, (work_dir, expected_dir))
    assert path.name == expected_path.name
    found, expected = (
        torch.load(path, weights_only=False) for path in (path, expected_path)
    )
    for part in ('state_dict', 'state_dict_ema'):
        assert (part in found) == (part in expected)
        for key, value in expected.get(part, {}).items():
            assert torch.equal(found[part][key], value), (part, key)
    moments = found['optimizer']['state']
    assert expected['optimizer']['state'].keys() == moments.keys()
    for index, state in expected['optimizer']['state'].items():
        for key, value in state.items():
            assert torch.equal(moments[index][key], value), (index, key)
    for key in ('epoch', 'iter', 'seed'):
        assert found['meta'][key] == expected['meta'][key]
    for group, expected_group in zip(
        found['optimizer']['param_groups'], expected['optimizer']['param_groups']
    ):
        assert group == expected_group


def test_an_interrupted_run_ends_as_if_it_had_not_been(segmentor):
    """Also with another number of workers; augmentation and drop path are random."""
    assert_same_end(segmentor / 'parts', segmentor / 'whole')
    assert newest_checkpoint(segmentor / 'parts').name == 'iter_5.pth'
    steps = [entry['step'] for entry in logged(segmentor / 'parts') if 'loss' in entry]
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_an_interrupted_run_of_epochs(run_tool, tmp_path):
    """As above, with an average that is the teacher from the second epoch on."""
    data = make_imagenet(tmp_path / 'data', train=40, val=10, size=32)

    def train(folder: str, epochs: int, workers: int, *arguments) -> Path:
        run_tool(
            'python', 'tools/train.py', 'configs/classification/mlla-nano_digits.py',
            '--work-dir', tmp_path / folder, *arguments, '--cfg-options',
            *without_workers(data, 'train', 'val'), 'train_dataloader.batch_size=8',
            'model.backbone.drop_path_rate=0.2', 'param_scheduler.warmup=1',
            f'train_cfg.max_epochs={epochs}', f'default_hooks.mesa.start={1 / epochs}',
            f'train_dataloader.num_workers={workers}',
            f'train_dataloader.persistent_workers={workers > 0}',
        )  # fmt: skip
        return newest_checkpoint(tmp_path / folder)

    interrupted = train('interrupted', 2, 2)
    seed = seed_of(interrupted)
    resumed = train('interrupted', 4, 0, '--resume')  # which removes the older one
    expected = train('uninterrupted', 4, 1, '--seed', seed)
    assert resumed.name == expected.name != interrupted.name
    assert_same_end(resumed.parent, expected.parent)


def test_counts_of_numpy_do_not_overflow():
    """In 8 bits, 255 + 1 would be 0."""
    meta = dict(epoch=np.uint8(255), iter=np.int16(32767))
    messages = dict(log_scalars={}, runtime_info={}, resumed_keys={})
    runner = SimpleNamespace(_resume=True, _load_from='x.pth', hooks=[])
    ResumedStateHook().after_load_checkpoint(
        runner, dict(meta=meta, message_hub=messages)
    )
    assert (meta['epoch'] + 1, meta['iter'] + 1) == (256, 32768)

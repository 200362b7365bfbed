# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Real runs of the tools with the digits demo's config, on two CPU processes."""

import json
import pickle
from pathlib import Path

import cv2
import pytest
import torch

CONFIG = 'configs/detection/mask-rcnn_mlla-nano_fpn_digits.py'
pytest.importorskip('mmdet')


def overrides(data_root, **more):
    """The demo's config on a small data set."""
    paths = {}
    for split in ('train', 'val', 'test'):
        paths[f'{split}_dataloader.dataset.data_root'] = f'{data_root}/'
        paths[f'{split}_dataloader.num_workers'] = 0
        paths[f'{split}_dataloader.persistent_workers'] = False
    for split in ('val', 'test'):
        paths[f'{split}_evaluator.ann_file'] = (
            f'{data_root}/annotations/instances_val.json'
        )
    paths['default_hooks.logger.interval'] = 1
    return ['--cfg-options', *(f'{k}={v}' for k, v in {**paths, **more}.items())]


def logged(work_dir):
    """Every entry of a work_dir's logs, in the order of the runs."""
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(x) for f in files for x in f.read_text().splitlines()]


def metrics(work_dir):
    log = sorted(work_dir.glob('*/*.json'))[-1]
    values = json.loads(log.read_text())
    return {key: value for key, value in values.items() if key.startswith('coco/')}


@pytest.fixture(scope='module')
def trained(run_tool, digits_coco, tmp_path_factory):
    """Two epochs on two processes, and what was printed."""
    work_dir = tmp_path_factory.mktemp('work')
    result = run_tool(
        'bash', 'tools/dist_train.sh', CONFIG, 2, '--work-dir', work_dir,
        '--seed', 0, *overrides(digits_coco, **{'train_cfg.max_epochs': 2}),
    )  # fmt: skip
    return work_dir, result.stdout


def test_training_on_two_processes(trained):
    work_dir, output = trained
    entries = logged(work_dir)
    losses = [entry['loss'] for entry in entries if 'loss' in entry]
    # 16 images / (2 processes x 4) = 2 iterations an epoch.
    assert len(losses) == 4
    assert all(0 < loss < 20 for loss in losses)
    evaluations = [entry for entry in entries if 'coco/bbox_mAP' in entry]
    assert [entry['step'] for entry in evaluations] == [1, 2]
    assert (work_dir / 'epoch_2.pth').is_file()
    # The total batch size is the recipe's: nothing to say about it.
    assert 'total batch size' not in output


@pytest.fixture(scope='module')
def evaluated(trained, run_tool, digits_coco):
    """The last checkpoint tested by one process ('test') and by two ('two')."""
    work_dir, _ = trained
    checkpoint = work_dir / 'epoch_2.pth'
    for name, command in {
        'test': ['python', 'tools/test.py', CONFIG, checkpoint],
        'two': ['bash', 'tools/dist_test.sh', CONFIG, checkpoint, 2],
    }.items():
        folder = work_dir / name
        run_tool(
            *command, '--work-dir', folder, '--out', folder / 'predictions.pkl',
            '--show-dir', folder / 'pictures', *overrides(digits_coco),
        )  # fmt: skip
    return work_dir


# MMEngine's visualizers draw on the first process alone.
@pytest.mark.parametrize('name, pictures', [('test', 5), ('two', 3)])
def test_evaluation_equals_the_one_in_training(evaluated, name, pictures):
    in_training = [e for e in logged(evaluated) if 'coco/bbox_mAP' in e][1]
    found = metrics(evaluated / name)
    assert found
    assert found == {key: in_training[key] for key in found}
    predictions = pickle.loads((evaluated / name / 'predictions.pkl').read_bytes())
    # Five images on two processes: the repeated one is left out.
    assert sorted(p['img_id'] for p in predictions) == [1, 2, 3, 4, 5]
    assert len(list((evaluated / name / 'pictures').glob('*.png'))) == pictures


def test_report(evaluated, run_tool):
    work_dir = evaluated
    config = work_dir / Path(CONFIG).name  # as it was run
    lines = run_tool(
        'python', 'tools/analysis_tools/demo_report.py', config, work_dir
    ).stdout.splitlines()
    found = metrics(work_dir / 'test')
    assert f'bbox_mAP: {found["coco/bbox_mAP"]:.3f}' in lines
    assert f'segm_mAP: {found["coco/segm_mAP"]:.3f}' in lines
    for name in ('predictions', 'curves'):
        picture = cv2.imread(str(work_dir / f'{name}.png'))
        assert min(picture.shape[:2]) > 300
        assert picture.std() > 10


def test_resume(trained, run_tool, digits_coco):
    work_dir, _ = trained
    before = torch.load(work_dir / 'epoch_2.pth', weights_only=False)
    output = run_tool(
        'python', 'tools/train.py', CONFIG, '--work-dir', work_dir, '--resume',
        '--launcher', 'pytorch',
        *overrides(digits_coco, **{'train_cfg.max_epochs': 3}), processes=2,
    ).stdout  # fmt: skip
    assert 'epoch_2.pth' in output
    steps = [entry['step'] for entry in logged(work_dir) if 'loss' in entry]
    assert steps == [1, 2, 3, 4, 5, 6]
    after = torch.load(work_dir / 'epoch_3.pth', weights_only=False)
    assert after['meta']['epoch'] == 3

    def updates(checkpoint):
        return checkpoint['optimizer']['state'][0]['step']

    assert (updates(before), updates(after)) == (4, 6)


def test_another_batch_size_is_announced(run_tool, digits_coco, tmp_path):
    command = ['python', 'tools/train.py', CONFIG, '--work-dir', tmp_path]
    options = overrides(
        digits_coco, **{'train_cfg.max_epochs': 1, 'train_dataloader.batch_size': 2}
    )
    output = run_tool(*command, *options).stdout
    assert "total batch size is 2 (1 processes x 2); the recipe's is 8" in output
    assert '--keep-batch-size' in output
    first = next(entry for entry in logged(tmp_path) if 'loss' in entry)

    output = run_tool(*command, '--auto-scale-lr', *options).stdout
    assert 'The learning rate is scaled by 0.25' in output
    # Entries of the second run follow those of the first.
    scaled = [entry for entry in logged(tmp_path) if entry.get('iter') == 1][-1]
    assert scaled['lr'] == pytest.approx(first['lr'] / 4)

    records = [
        json.loads(p.read_text()) for p in sorted(tmp_path.glob('*/recipe.json'))
    ]
    assert [record['total batch'] for record in records] == [
        dict(recipe=8, actual=2)
    ] * 2
    assert records[0]['learning rate'] == dict(recipe=1e-3, actual=1e-3)
    assert records[1]['learning rate'] == dict(recipe=1e-3, actual=2.5e-4)
    # 16 images: two updates of 8, or eight of 2.
    assert records[0]['updates per epoch'] == dict(recipe=2, actual=8)
    assert records[0]['PyTorch']['actual'].startswith(torch.__version__)


def test_a_batch_size_that_does_not_fit(run_tool, tmp_path):
    result = run_tool(
        'python', 'tools/train.py', CONFIG, '--keep-batch-size',
        '--launcher', 'pytorch', '--work-dir', tmp_path, check=False, processes=3,
    )  # fmt: skip
    assert result.returncode != 0
    assert "3 processes x 4 images does not divide the recipe's total" in result.stdout
    assert 'there can be 1 or 2 processes' in result.stdout
    assert 'train.py", line' not in result.stdout


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['no/such.py'], 'Error: Config not found: no/such.py'),
        ([CONFIG, '--resume', 'no.pth'], 'Error: Checkpoint to resume from not found'),
        ([CONFIG, '--amp'], 'Error: --amp needs a GPU'),
        (
            ['configs/detection/mask-rcnn_mlla-t_fpn_1x_coco.py'],
            'Error: Pretrained weights not found: data/MLLA_T.pth',
        ),
        ([CONFIG, '--launcher', 'pytorch'], "Error: launcher 'pytorch' needs RANK"),
    ],
)
def test_train_errors(run_tool, tmp_path, arguments, message):
    result = run_tool(
        'python', 'tools/train.py', *arguments, '--work-dir', tmp_path, check=False
    )
    assert result.returncode != 0
    assert message in result.stdout
    assert 'Traceback' not in result.stdout


@pytest.mark.parametrize(
    'arguments, message',
    [
        ([], 'Error: Checkpoint not found'),
        (['--tta'], 'Error: --tta needs tta_model in the config'),
        (['--out', 'results.json'], 'Error: --out must end in .pkl'),
    ],
)
def test_test_errors(run_tool, tmp_path, arguments, message):
    checkpoint = tmp_path / 'model.pth'
    if arguments:
        torch.save({}, checkpoint)
    result = run_tool(
        'python', 'tools/test.py', CONFIG, checkpoint, *arguments,
        '--work-dir', tmp_path, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert message in result.stdout
    assert 'Traceback' not in result.stdout


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh'])
def test_launchers_without_arguments_say_how_to_use_them(run_tool, script):
    result = run_tool('bash', f'tools/{script}', check=False)
    assert result.returncode == 2
    assert f'Usage: tools/{script}' in result.stdout


def test_process_count_must_be_a_number(run_tool):
    result = run_tool('bash', 'tools/dist_train.sh', CONFIG, 'two', check=False)
    assert result.returncode == 2
    assert "GPUS must be a positive number, got 'two'" in result.stdout


def test_slurm_command(run_tool, tmp_path):
    """srun is not there: a program of its name writes down how it was called."""
    srun = tmp_path / 'srun'
    srun.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/call\n')
    srun.chmod(0o755)
    run_tool(
        'bash', '-c',
        f'PATH={tmp_path}:$PATH GPUS=16 GPUS_PER_NODE=8 SRUN_ARGS="--time 1:00" '
        f'bash tools/slurm_train.sh part job {CONFIG} --amp',
    )  # fmt: skip
    call = (tmp_path / 'call').read_text().splitlines()
    assert '--partition=part' in call
    assert '--ntasks=16' in call
    assert '--ntasks-per-node=8' in call
    assert call[call.index('--time') + 1] == '1:00'
    assert call[-4:] == [CONFIG, '--amp', '--launcher', 'slurm']
    assert call[-5].endswith('tools/train.py')

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Real runs of the tools with the digits demos, on one and two CPU processes."""

import json
import os
import pickle
import re
import shutil
import socket
import sys
from pathlib import Path

import cv2
import pytest
import torch

from ..processes import ROOT
from ..runs import logged, without_workers

CONFIG = 'configs/detection/mask-rcnn_mlla-nano_fpn_digits.py'
CLASSIFIER = 'configs/classification/mlla-nano_digits.py'
SPLITS = ('train', 'val', 'test')
pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')


def overrides(data_root):
    """The demo's config on a small data set."""
    annotations = f'{data_root}/annotations/instances_val.json'
    return [
        *('--cfg-options', *without_workers(data_root, *SPLITS)),
        *(f'{split}_evaluator.ann_file={annotations}' for split in SPLITS[1:]),
        'default_hooks.logger.interval=1',
    ]


def metrics(work_dir):
    log = sorted(work_dir.glob('*/*.json'))[-1]
    values = json.loads(log.read_text())
    return {key: value for key, value in values.items() if key.startswith('coco/')}


@pytest.fixture(scope='module')
def trained(run_tool, digits_coco, once):
    """A work_dir after an epoch on one process, and what was printed."""

    def fill(folder):
        # A process that imports the packages itself, as those of run_tool do not.
        result = run_tool(
            'bash', 'tools/dist_train.sh', CONFIG, 1, '--work-dir', folder / 'work',
            '--seed', 0, *overrides(digits_coco), 'train_cfg.max_epochs=1',
            'train_dataloader.batch_size=8',
        )  # fmt: skip
        (folder / 'printed.txt').write_text(result.stdout)

    folder = once('trained', fill)
    return folder / 'work', (folder / 'printed.txt').read_text()


@pytest.fixture(scope='module')
def resumed(run_tool, digits_coco, once, trained):
    """The same after another epoch, on two processes."""

    def fill(folder):
        work_dir = shutil.copytree(trained[0], folder / 'work')
        result = run_tool(
            'python', 'tools/train.py', CONFIG, '--work-dir', work_dir, '--resume',
            '--launcher', 'pytorch', *overrides(digits_coco),
            'train_cfg.max_epochs=2', processes=2,
        )  # fmt: skip
        (folder / 'printed.txt').write_text(result.stdout)

    folder = once('resumed', fill)
    return folder / 'work', (folder / 'printed.txt').read_text()


@pytest.fixture(scope='module')
def evaluated(run_tool, digits_coco, once, resumed):
    """Tests of the last checkpoint by one process and by two."""

    def fill(folder):
        for name, processes in (('one', None), ('two', 2)):
            out = folder / name
            run_tool(
                'python', 'tools/test.py', CONFIG, resumed[0] / 'epoch_2.pth',
                '--launcher', 'pytorch' if processes else 'none', '--work-dir', out,
                '--out', out / 'predictions.pkl', '--show-dir', out / 'pictures',
                *overrides(digits_coco), processes=processes,
            )  # fmt: skip

    return once('tested', fill)


# What only the log file has of a training, and what both have.
IN_THE_LOG = (
    *('System environment:', 'Config:', 'paramwise_options', 'Hooks will be executed'),
    'Average Precision',
)
ON_THE_CONSOLE = ('The run:', 'Epoch(train) [1][2/2]', 'Epoch(val) [1]', 'segm_mAP: ')


def test_console_of_a_training(trained):
    work_dir, console = trained
    (log,) = work_dir.glob('*/*.log')
    assert str(log) in console
    for text in ON_THE_CONSOLE:
        assert text in console and text in log.read_text()
    for text in IN_THE_LOG:
        assert text not in console and text in log.read_text()
    # Of five images, some digits are in none.
    warning = 'Warning: 3 classes of val_dataloader.dataset have no objects: 1, 6, 7.'
    assert warning in console
    for text in ('OneDL', 'Warning', 'WARNING', 'warn('):
        assert text not in console.replace(warning, '')


def test_training(trained, resumed):
    entries = logged(resumed[0])
    losses = [(entry['step'], entry['loss']) for entry in entries if 'loss' in entry]
    # 16 images / (1 process x 8 or 2 x 4) = 2 iterations an epoch.
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    assert all(0 < loss < 20 for _, loss in losses)
    evaluations = [entry for entry in entries if 'coco/bbox_mAP' in entry]
    assert [entry['step'] for entry in evaluations] == [1, 2]
    # The total batch size is the recipe's: nothing to say about it.
    for _, printed in (trained, resumed):
        assert 'total batch size' not in printed


def test_resume(resumed):
    work_dir, printed = resumed
    assert 'epoch_1.pth' in printed
    checkpoints = [
        torch.load(work_dir / f'epoch_{epoch}.pth', weights_only=False)
        for epoch in (1, 2)
    ]
    assert [x['meta']['epoch'] for x in checkpoints] == [1, 2]
    assert [x['optimizer']['state'][0]['step'] for x in checkpoints] == [2, 4]


# MMEngine's visualizers draw on the first process alone.
@pytest.mark.parametrize('name, pictures', [('one', 5), ('two', 3)])
def test_evaluation_equals_the_one_in_training(resumed, evaluated, name, pictures):
    in_training = [e for e in logged(resumed[0]) if 'coco/bbox_mAP' in e][1]
    folder = evaluated / name
    found = metrics(folder)
    assert found
    assert found == {key: in_training[key] for key in found}
    predictions = pickle.loads((folder / 'predictions.pkl').read_bytes())
    # Five images on two processes: the repeated one is left out.
    assert sorted(p['img_id'] for p in predictions) == [1, 2, 3, 4, 5]
    assert len(list((folder / 'pictures').glob('*.png'))) == pictures


def test_report(resumed, evaluated, call_tool, tmp_path):
    """As tools/quickstart.sh calls for it."""
    work_dir = shutil.copytree(resumed[0], tmp_path / 'work')
    shutil.copytree(evaluated / 'one', work_dir / 'test')
    config = work_dir / Path(CONFIG).name  # as it was run
    lines = call_tool(
        'tools/analysis_tools/demo_report.py', config, work_dir
    ).stdout.splitlines()
    found = metrics(work_dir / 'test')
    assert f'bbox_mAP: {found["coco/bbox_mAP"]:.3f}' in lines
    assert f'segm_mAP: {found["coco/segm_mAP"]:.3f}' in lines
    for name in ('predictions', 'curves'):
        picture = cv2.imread(str(work_dir / f'{name}.png'))
        assert min(picture.shape[:2]) > 300
        assert picture.std() > 10


def test_another_batch_size_is_announced(run_tool, digits_imagenet, tmp_path):
    """In two runs; with -v the second one shows what the log has."""
    options = [
        *without_workers(digits_imagenet, *SPLITS[:2]),
        *('train_cfg.max_epochs=1', 'train_dataloader.batch_size=8'),
        *('param_scheduler.warmup=0', 'default_hooks.logger.interval=1'),
    ]
    printed = [
        run_tool(
            'python', 'tools/train.py', CLASSIFIER, '--work-dir', tmp_path, *more,
            '--cfg-options', *options,
        ).stdout
        for more in ([], ['-v', '--auto-scale-lr'])
    ]  # fmt: skip
    announced, scaled = printed
    assert "total batch size is 8 (1 processes x 8); the recipe's is 32" in announced
    assert '--keep-batch-size' in announced
    assert 'The learning rate is scaled by 0.25' in scaled
    for text in IN_THE_LOG[:-1]:
        assert text not in announced and text in scaled
    # Entries of the second run follow those of the first.
    first, last = (e['lr'] for e in logged(tmp_path) if e.get('iter') == 1)
    assert last == pytest.approx(first / 4)

    paths = sorted(tmp_path.glob('*/recipe.json'))
    records = [json.loads(path.read_text()) for path in paths]
    assert [r['total batch'] for r in records] == [dict(recipe=32, actual=8)] * 2
    assert records[0]['learning rate'] == dict(recipe=2e-3, actual=2e-3)
    assert records[1]['learning rate'] == dict(recipe=2e-3, actual=5e-4)
    # 40 images: one whole update of 32, or five of 8.
    assert records[0]['updates per epoch'] == dict(recipe=1, actual=5)
    assert records[0]['PyTorch']['actual'].startswith(torch.__version__)


def test_a_batch_size_that_does_not_fit(call_tool, monkeypatch, tmp_path):
    """Found before the processes meet; the first of them speaks."""
    for rank, said in ((0, True), (1, False)):
        variables = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=3, LOCAL_WORLD_SIZE=3)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        result = call_tool(
            'tools/train.py', CONFIG, '--keep-batch-size', '--launcher', 'pytorch',
            '--work-dir', tmp_path, check=False,
        )  # fmt: skip
        assert result.returncode == 1
        assert ('3 processes x 4 images' in result.stderr) == said
        assert ('fit 4 images each: 1, 2.' in result.stderr) == said


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['no/such.py'], ['Config', 'no/such.py']),
        ([CONFIG, '--resume', 'no.pth'], ['resume', 'no.pth', '--resume']),
        ([CONFIG, '--amp'], ['--amp', 'GPU']),
        (
            ['configs/detection/mask-rcnn_mlla-t_fpn_1x_coco.py'],
            ['Pretrained', 'data/MLLA_T.pth'],
        ),
        ([CONFIG, '--launcher', 'pytorch'], ['RANK', 'tools/dist_train.sh']),
    ],
)
def test_train_errors(call_tool, tmp_path, arguments, words):
    result = call_tool(
        'tools/train.py', *arguments, '--work-dir', tmp_path, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith('Error: ')
    assert all(word in result.stderr for word in words)


@pytest.mark.parametrize(
    'arguments, words',
    [
        ([], ['Checkpoint', 'model.pth']),
        (['--tta'], ['--tta', 'tta_model']),
        (['--out', 'results.json'], ['--out', '.pkl', 'results.json']),
    ],
)
def test_test_errors(call_tool, tmp_path, arguments, words):
    checkpoint = tmp_path / 'model.pth'
    if arguments:
        torch.save({}, checkpoint)
    result = call_tool(
        'tools/test.py', CONFIG, checkpoint, *arguments, '--work-dir', tmp_path,
        check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.startswith('Error: ')
    assert all(word in result.stderr for word in words)


IN_A_FILE = ROOT / 'setup.py' / 'work'
CHECKED = {
    'work_dir': (['train.py', '--work-dir', IN_A_FILE],
                 'Not a directory', IN_A_FILE, '--work-dir'),
    'config of a training': (['train.py', '--cfg-options', 'model.backbone.arhc=tiny'],
                             'model.backbone.arhc', 'arch meant'),
    'config of a test': (
        ['test.py', ROOT / CLASSIFIER, '--cfg-options', 'model.backbone.arhc=tiny'],
        'model.backbone.arhc', 'arch meant'),
    'type of a training': (['train.py', '--cfg-options', 'model.backbone.type=MLA'],
                           'MLA is not in the', 'registry'),
    'type of a test': (
        ['test.py', ROOT / CLASSIFIER, '--cfg-options', 'model.backbone.type=MLA'],
        'MLA is not in the', 'registry'),
    'argument of a mixer': (
        ['train.py', '--cfg-options', 'model.backbone.token_mixer.type=LinearAttention',
         'model.backbone.token_mixer.input_gatee=True'],
        'model.backbone.token_mixer.input_gatee', 'input_gate meant'),
    'type of a mixer': (
        ['train.py', '--cfg-options', 'model.backbone.token_mixer.type=LinearAtention'],
        'LinearAtention is not in the', 'registry'),
    'no dict of a mixer': (
        ['train.py', '--cfg-options', 'model.backbone.token_mixer=LinearAttention'],
        'model.backbone: token_mixer must be a dict', "'LinearAttention'"),
    'value of a mixer': (
        ['train.py', '--cfg-options', 'model.backbone.token_mixer.num_heads=5'],
        'model.backbone.token_mixer: ', 'num_heads = 5 does not divide'),
    'metric': (
        ['train.py', '--cfg-options', 'default_hooks.checkpoint.save_best=acc/top1'],
        'acc/top1', "default_hooks.checkpoint.save_best='accuracy/top1'"),
    'validation': (
        ['train.py', '--cfg-options', 'val_dataloader=None', 'val_cfg=None',
         'val_evaluator=None'], 'default_hooks.checkpoint.save_best=None'),
    'part of a validation': (['train.py', '--cfg-options', 'val_cfg=None'],
                             'no val_cfg', 'val_dataloader=None val_evaluator=None'),
    'part of a training': (['train.py', '--cfg-options', 'train_dataloader=None'],
                           'Training needs train_dataloader'),
    'no test': (
        ['test.py', ROOT / CLASSIFIER, '--cfg-options', 'test_dataloader=None',
         'test_cfg=None', 'test_evaluator=None'], 'A test needs test_dataloader'),
    'data': (['train.py', '--cfg-options', 'val_dataloader.dataset.data_root=nowhere'],
             'nowhere/val', 'data_root', 'val_dataloader.dataset'),
}  # fmt: skip


@pytest.mark.parametrize('case', CHECKED)
def test_what_is_checked_before_a_run(call_tool, digits_imagenet, tmp_path, case):
    (tool, *arguments), *words = CHECKED[case]
    path = tmp_path / 'config.py'
    path.write_text(
        f"_base_ = '{ROOT / CLASSIFIER}'\n"
        f"train_dataloader = dict(dataset=dict(data_root='{digits_imagenet}'))\n"
        f"val_dataloader = dict(dataset=dict(data_root='{digits_imagenet}'))\n"
        f"test_dataloader = dict(dataset=dict(data_root='{digits_imagenet}'))\n"
        f"work_dir = '{tmp_path}/work'\n"
    )
    result = call_tool(f'tools/{tool}', path, *arguments, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith('Error: ') and result.stderr.count('\n') == 1
    assert all(str(word) in result.stderr for word in words)


def test_an_epoch_without_an_update(run_tool, digits_imagenet, tmp_path):
    result = run_tool(
        'python', 'tools/train.py', CLASSIFIER, '--work-dir', tmp_path,
        '--cfg-options', *without_workers(digits_imagenet, 'train', 'val'),
        'train_dataloader.batch_size=10000', check=False,
    )  # fmt: skip
    assert result.returncode == 1
    (line,) = [x for x in result.stdout.splitlines() if x.startswith('Error: ')]
    assert 'no update' in line and 'train_dataloader.batch_size' in line
    assert 'Traceback' not in result.stdout


def test_a_checkpoint_that_comes_after_the_end(run_tool, digits_imagenet, tmp_path):
    """Two processes end before the first update, with one message."""
    result = run_tool(
        'python', 'tools/train.py', CLASSIFIER, '--work-dir', tmp_path,
        '--launcher', 'pytorch',
        '--cfg-options', *without_workers(digits_imagenet, 'train', 'val'),
        'train_cfg.max_epochs=1', 'default_hooks.checkpoint.by_epoch=False',
        'default_hooks.checkpoint.interval=1000', processes=2, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stdout.count('Error: ') == 1 and 'Traceback' not in result.stdout
    assert 'default_hooks.checkpoint.interval is 1000 iterations' in result.stdout
    assert 'Epoch(train)' not in result.stdout and not list(tmp_path.glob('*.pth'))


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh'])
def test_launchers_without_arguments_say_how_to_use_them(run_tool, script):
    result = run_tool('bash', f'tools/{script}', check=False)
    assert result.returncode == 2
    assert f'Usage: tools/{script}' in result.stdout


def test_torchrun_command(run_tool, tmp_path):
    """An interpreter that writes down how it was called."""
    program = tmp_path / 'python'
    program.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then exec {sys.executable} "$@"; fi\n'
        f'printf "%s\\n" "$OMP_NUM_THREADS" "$@" > {tmp_path}/call\n'
        f'printf "%s" "$PET_RDZV_ID" > {tmp_path}/id\n'
        f'ls -l /proc/self/fd > {tmp_path}/files\n'
    )
    program.chmod(0o755)

    def call(*words, **variables):
        variables = dict(variables, PYTHON=program, OMP_NUM_THREADS='')
        run_tool('bash', *words, env={k: str(v) for k, v in variables.items()})
        return (tmp_path / 'call').read_text().splitlines()

    threads, *words = call('tools/dist_test.sh', CONFIG, 'a.pth', 2, '--tta')
    assert threads == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert words[:2] == ['-m', 'torch.distributed.run']
    expected = {'--nnodes': '1', '--nproc-per-node': '2', '--max-restarts': '0'}
    expected.update({'--rdzv-backend': 'c10d', '--local-addr': '127.0.0.1'})
    found = dict(zip(words, words[1:]))
    assert expected.items() <= found.items()
    assert 'store_type=file' in found['--rdzv-conf']
    # Its file is removed already, and open.
    assert found['--rdzv-endpoint'] == '/proc/self/fd/9'
    assert re.search(r' 9 -> .*\(deleted\)', (tmp_path / 'files').read_text())
    script, *rest = words[-6:]
    assert script == str(ROOT / 'tools/test.py')
    assert rest == [CONFIG, 'a.pth', '--tta', '--launcher', 'pytorch']
    machines = dict(NNODES=3, NODE_RANK=2, MASTER_ADDR='first', PORT=7)
    words = call('tools/dist_train.sh', CONFIG, 4, '--amp', **machines)
    expected = {'--nnodes': '3', '--nproc-per-node': '4', '--node-rank': '2'}
    expected.update({'--master-addr': 'first', '--master-port': '7'})
    assert expected.items() <= dict(zip(words, words[1:])).items()
    script, *rest = words[-5:]
    assert script == str(ROOT / 'tools/train.py')
    assert rest == [CONFIG, '--amp', '--launcher', 'pytorch']
    machines.update(MAX_RESTARTS=2, RDZV_ID='secret')
    words = call('tools/dist_train.sh', CONFIG, 4, **machines)
    expected = {'--rdzv-backend': 'c10d', '--rdzv-endpoint': 'first:7'}
    expected.update({'--max-restarts': '2', '--rdzv-conf': 'is_host=false'})
    assert expected.items() <= dict(zip(words, words[1:])).items()
    # The list of processes does not show it.
    assert (tmp_path / 'id').read_text() == 'secret' and 'secret' not in words

    # On GPUs, several processes have one thread each, as torchrun would set it.
    (tmp_path / 'nvidia-smi').write_text('#!/bin/sh\n')
    (tmp_path / 'nvidia-smi').chmod(0o755)
    path = f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'
    assert call('tools/dist_train.sh', CONFIG, 2, PATH=path)[0] == '1'
    assert call('tools/dist_train.sh', CONFIG, 1, PATH=path)[0] == ''


@pytest.mark.parametrize(
    'count', ['two', '-1', '1.5', '', "1)); open('ran', 'w') #", '$(touch ran)']
)
def test_counts_must_be_numbers(run_tool, count):
    for name, gpus, variables in (
        ('GPUS', count, {}),
        ('NNODES', 1, dict(NNODES=count or '0')),
        ('PORT', 1, dict(NNODES='2', PORT=count or '0')),
        ('NODE_RANK', 1, dict(NODE_RANK=count or 'x')),
        ('MAX_RESTARTS', 1, dict(MAX_RESTARTS=count or 'x')),
    ):
        result = run_tool(
            'bash', 'tools/dist_train.sh', CONFIG, gpus, check=False, env=variables
        )
        assert result.returncode == 2
        assert f'Error: {name} must be a' in result.stdout
        assert f"'{variables.get(name, count)}'" in result.stdout
        assert not Path('ran').exists()


def test_restarts_on_several_machines_need_an_id(run_tool):
    variables = dict(NNODES='2', NODE_RANK='1', MAX_RESTARTS='1', RDZV_ID='')
    result = run_tool(
        'bash', 'tools/dist_train.sh', CONFIG, 2, check=False, env=variables
    )
    assert result.returncode == 2
    assert 'RDZV_ID' in result.stdout and 'secrets.token_hex' in result.stdout


def test_port_in_use(run_tool):
    with socket.create_server(('', 0)) as taken:
        port = str(taken.getsockname()[1])
        variables = dict(NNODES='2', PORT=port)
        result = run_tool(
            'bash', 'tools/dist_train.sh', CONFIG, 2, check=False, env=variables
        )
    assert result.returncode == 2
    assert f'Error: port {port} ' in result.stdout and 'PORT=' in result.stdout


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

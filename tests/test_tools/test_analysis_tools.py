# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The tools that look at configs, data and runs."""

import json
from pathlib import Path

import cv2
import pytest
from mmengine.config import Config

from ..runs import SEGMENTOR, logged
from ..test_evaluation.work_dirs import add_session, coco_log

pytest.importorskip('mmseg')
pytest.importorskip('mmpretrain')


@pytest.fixture
def work_dir(segmentor):
    """A run of five iterations; its checkpoint is tested, multi-scale, with --amp."""
    return segmentor / 'whole'


def test_compare_a_real_run(call_tool, work_dir, tmp_path):
    output = call_tool(
        'tools/analysis_tools/compare_with_paper.py', work_dir,
        '--out', tmp_path,
    ).stdout  # fmt: skip
    validated = [e for e in logged(work_dir) if 'mIoU' in e][-1]['mIoU']
    (test,) = (p for p in work_dir.glob('*/*.json') if p.stem == p.parent.name)
    tested = json.loads(test.read_text())['mIoU']
    cells = [[c.strip() for c in line.split('|')] for line in output.splitlines()]
    rows = {tuple(row[2:4]): row[4:7] for row in cells if len(row) == 8}
    nothing = ['-', '-']
    assert rows['validation, iteration 5 of 5', 'mIoU'] == [
        f'{validated:.2f}',
        *nothing,
    ]
    assert rows['test of iter_5.pth', 'mIoU(ms+flip)'] == [f'{tested:.2f}', *nothing]
    assert 'Nothing is published about a config named upernet_mlla-nano' in output
    # What training wrote down of its recipe.
    deviations = {row[1]: row[2:4] for row in cells if len(row) == 5}
    assert deviations['total batch'] == ['8', '4']
    assert deviations['length'] == ['1200 iterations', '5 iterations']
    assert (tmp_path / 'comparison.md').read_text() in output
    assert cv2.imread(str(tmp_path / 'comparison.png')).std() > 10


def test_mixed_precision_of_a_test(work_dir):
    """MMEngine's test loop takes it from the config."""
    assert Config.fromfile(work_dir / Path(SEGMENTOR).name).test_cfg.fp16


def test_exit_status_beyond_the_tolerance(call_tool, tmp_path):
    add_session(tmp_path, '20260101_000000', entries=coco_log(range(1, 13), box=0.46))
    result = call_tool(
        'tools/analysis_tools/compare_with_paper.py', tmp_path, check=False
    )
    assert result.returncode == 1
    assert '**-0.80** (beyond 0.5)' in result.stdout
    assert (tmp_path / 'comparison.md').is_file()


def test_analyze_logs(call_tool, work_dir, tmp_path):
    """mmpretrain's tool reads the log of a segmentor."""
    log = next(work_dir.glob('*/vis_data/scalars.json'))
    tool = ['tools/analysis_tools/analyze_logs.py']
    out = tmp_path / 'curve.png'
    call_tool(*tool, 'plot_curve', log, '--keys', 'mIoU', '--out', out)
    assert cv2.imread(str(out)).std() > 10
    output = call_tool(*tool, 'cal_train_time', log).stdout
    assert 'average iter time' in output


def test_get_flops(call_tool):
    """The paper's figures are for its own image, so none stands beside another."""
    config = 'configs/classification/mlla-t_8xb128_in1k.py'
    output = call_tool(
        'tools/analysis_tools/get_flops.py', config, '--shape', 96, 64,
        '--depth', 1,
    ).stdout  # fmt: skip
    assert '|  backbone ' in output
    assert 'backbone.layers' not in output
    cells = [cell.strip() for cell in output.splitlines()[-1].split('|')]
    assert cells[2:5] == ['96x64', '24.39 M', '-']
    assert cells[6:8] == ['-', '-']


def test_get_flops_beside_the_paper(call_tool):
    config = 'configs/classification/mlla-t_8xb128_in1k.py'
    row = call_tool('tools/analysis_tools/get_flops.py', config).stdout.splitlines()[-1]
    cells = [cell.strip() for cell in row.split('|')]
    assert cells[2:7] == ['224x224', '24.39 M', '25 M', '4.15 G', '4.2 G']


def test_get_flops_of_a_forget_gate(call_tool):
    """It says how its recurrence is counted. No pass over its tokens is needed."""
    config = 'configs/classification/ablation/la-swin-t_forget-gate_8xb128_in1k.py'
    tool = 'tools/analysis_tools/get_flops.py'
    *_, row, _, note = call_tool(tool, config).stdout.splitlines()
    cells = [cell.strip() for cell in row.split('|')]
    assert cells[2:7] == ['224x224', '28.68 M', '29 M', '4.82 G', '4.8 G']
    assert note == (
        'la-swin-t_forget-gate_8xb128_in1k: 0.41 G of the FLOPs are the recurrence of '
        'the forget gate, counted as 9 per token, channel and state.'
    )


def test_print_config(call_tool):
    output = call_tool(
        'tools/misc/print_config.py', SEGMENTOR,
        '--cfg-options', 'train_dataloader.batch_size=3',
    ).stdout  # fmt: skip
    assert 'batch_size=3,' in output
    assert "type='UPerHead'" in output  # of a base


def test_browse_dataset(call_tool, segmentor, tmp_path):
    out = tmp_path / 'samples.png'
    call_tool(
        'tools/analysis_tools/browse_dataset.py', SEGMENTOR, '--out', out,
        '--num-images', 2, '--mode', 'repeat', '--cfg-options',
        f'train_dataloader.dataset.data_root={segmentor}/data',
    )  # fmt: skip
    assert cv2.imread(str(out)).std() > 10


def test_plot_accuracy_latency(call_tool, tmp_path):
    names = ['mlla-t_8xb128_in1k', 'convnext-tiny_32xb128_in1k']
    output = call_tool(
        'tools/analysis_tools/plot_accuracy_latency.py', '--models', *names,
        '--device', 'cpu', '--shape', 32, 32, '--repeats', 1, '--out', tmp_path,
    ).stdout  # fmt: skip
    content = json.loads((tmp_path / 'accuracy_latency.json').read_text())
    assert [model['name'] for model in content['models']] == names
    assert (content['batch_size'], content['shape']) == (1, [32, 32])
    assert all(name in output for name in names)
    assert cv2.imread(str(tmp_path / 'accuracy_latency.png')).std() > 10


def test_benchmark(call_tool, tmp_path):
    output = call_tool(
        'tools/analysis_tools/benchmark.py', '--models', 'mlla-t', 'plain-t',
        '--shape', '32x64', '64x32', '--mode', 'infer', '--dtype', 'bfloat16',
        '--repeats', 1, '--threads', 1, '--device', 'cpu', '--out', tmp_path,
    ).stdout  # fmt: skip
    content = json.loads((tmp_path / 'benchmark.json').read_text())
    assert content['threads'] == 1
    assert [case['shape'] for case in content['cases']] == [[32, 64], [64, 32]]
    names = [model['model'] for model in content['cases'][0]['models']]
    assert names == ['mlla-t', 'plain-t']
    assert '### backbone 64x32, batch 1, infer, bfloat16' in output
    assert content['command'].endswith(f'--device cpu --out {tmp_path}')
    table = (tmp_path / 'benchmark.md').read_text()
    first_line = table.splitlines()[0]
    assert first_line.startswith(content['device'])
    assert f', torch {content["torch"]}' in first_line
    assert '| mlla-t ' in table
    assert cv2.imread(str(tmp_path / 'benchmark.png')).std() > 10


def test_benchmark_over_image_sizes(call_tool, tmp_path):
    output = call_tool(
        'tools/analysis_tools/benchmark.py', '--models', 'plain-t',
        '--sweep', 32, 64, '--repeats', 1, '--device', 'cpu', '--out', tmp_path,
    ).stdout  # fmt: skip
    assert '| Model   | 64 tokens | 256 tokens | exponent |' in output
    assert '### ms per image' in (tmp_path / 'benchmark.md').read_text()
    assert cv2.imread(str(tmp_path / 'benchmark.png')).std() > 10


@pytest.mark.parametrize('images', ['--shape', '--sweep'])
def test_benchmark_with_a_time_limit(images, call_tool, tmp_path):
    sides = ['32x32', '64x64'] if images == '--shape' else [32, 64]
    output = call_tool(
        'tools/analysis_tools/benchmark.py', '--models', 'plain-t',
        images, *sides, '--repeats', 1, '--seconds', 0.01, '--device', 'cpu',
        '--out', tmp_path,
    ).stdout  # fmt: skip
    assert 'Skipped after 0.01 s: backbone 64x64, batch 1, infer, float32' in output
    content = json.loads((tmp_path / 'benchmark.json').read_text())
    assert [case['shape'] for case in content['cases']] == [[32, 32]]
    assert '64x64' not in (tmp_path / 'benchmark.md').read_text()
    assert cv2.imread(str(tmp_path / 'benchmark.png')).std() > 10


@pytest.mark.parametrize(
    'tool, arguments, words',
    [
        ('analysis_tools/get_flops.py', ['no.py'], ['Config', 'no.py']),
        ('analysis_tools/compare_with_paper.py', ['no/run'], ['no/run']),
        ('analysis_tools/demo_report.py', [SEGMENTOR, 'no/run'], ['no/run/test']),
        (
            'analysis_tools/plot_accuracy_latency.py',
            ['--models', 'swin-huge'],
            ['swin-huge'],
        ),
        (
            'analysis_tools/benchmark.py',
            ['--models', 'mlla-t'],
            ['mlla-t', 'plain-t', '--models'],
        ),
        (
            'analysis_tools/benchmark.py',
            ['--sweep', '--mode', 'infer', 'train'],
            ['--sweep', '--mode', 'one'],
        ),
        (
            'analysis_tools/benchmark.py',
            ['--device', 'cpu', '--threads', '0'],
            ['--threads', 'at least 1', 'got 0'],
        ),
        (
            'analysis_tools/benchmark.py',
            ['--device', 'cpu', '--cuda-graph'],
            ['--cuda-graph', "'cpu'"],
        ),
        (
            'analysis_tools/benchmark.py',
            ['--device', 'cpu', '--seconds', '0'],
            ['--seconds', 'positive', 'got 0'],
        ),
        ('misc/print_config.py', ['no.py'], ['Config', 'no.py']),
    ],
)
def test_errors(call_tool, tool, arguments, words):
    result = call_tool(f'tools/{tool}', *arguments, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith('Error: ')
    assert all(word in result.stderr for word in words)

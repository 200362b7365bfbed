# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The study on digits: its configs, and the command that trains and compares them."""

import json
import math
import re
import statistics
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope

from benchmarks import ablation
from mlla_mm.checks.config import check_config
from mlla_mm.checks.monitors import check_monitors
from mlla_mm.evaluation.published import published_models

from ..processes import ROOT
from ..runs import without_workers

pytest.importorskip('mmpretrain')

TOOL = 'tools/analysis_tools/run_ablation.py'
FOLDER = ROOT / 'configs' / 'classification' / 'ablation'
ROWS = {row.name: row for row in ablation.digits_rows()}


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield


def read(row: str) -> Config:
    return Config.fromfile(ROWS[row].config)


def count(row: str) -> int:
    return sum(p.numel() for p in MODELS.build(read(row).model).parameters())


# Channels, and tokens of an image of 32x32 pixels, of each block.
CHANNELS = np.array([32, 64, 128, 128, 256])
TOKENS = np.array([64, 16, 4, 4, 1])


def delta(c):
    """Delta: W_1 and W_2, C x C_0 and C_0 x C, and b."""
    inner = -(-c // 16)
    return 2 * c * inner + c


def mamba(c, heads_dims):
    """Mamba's block alone with 2C channels inside, queries and keys so wide."""
    norm, in_and_act, conv = 2 * c, 2 * (2 * c * c + 2 * c), 9 * 2 * c + 2 * c
    qk, out = 2 * (2 * c * heads_dims + heads_dims), 2 * c * c + c
    return norm + in_and_act + conv + qk + out


def transformer(c):
    """The block of the baseline: two norms, attention, MLP."""
    return 4 * c + 4 * (c * c + c) + 8 * c * c + 5 * c


C = CHANNELS
#: Parameters that a row has more than the baseline.
MORE = {
    'baseline': 0,
    'input-gate': delta(C),
    'forget-gate': delta(C) + C * 32,
    'shortcut': C,
    'no-normalization': 0,
    # Queries and keys are 32 channels wide, not C.
    'single-head': 2 * (32 - C) * (C + 1),
    'block-all': [
        *(mamba(C, C) - transformer(C)),
        mamba(128, 128),  # the third stage has a block more
    ],
    # An input projection for V's, a gate, and a 3x3 convolution.
    'block-sub': C * C + C + 10 * C,
    'ape': C * TOKENS,
    'lepe': 10 * C,
    'cpe': 10 * C,
    'rope': 0,
    'mamba': [
        *(mamba(C, 32) - transformer(C)),
        mamba(128, 32),
        # Delta, A_log and D have 2C channels.
        *(delta(2 * c) + 2 * c * 32 + 2 * c for c in [*C, 128]),
    ],
    'softmax': 0,
    'hydra': 0,
    'efficient': 0,
    'enhanced': 10 * C,
    # A 5x5 convolution of 32 channels, which heads share, and scales.
    'focused': 26 * 32 + C,
}


def test_there_is_no_other_row():
    files = {path.stem for path in FOLDER.glob('*_digits.py')}
    assert files == {row.config.stem for row in ROWS.values()}
    assert MORE.keys() == ablation.ROWS.keys()


@pytest.mark.parametrize('row', MORE)
def test_parameters(row):
    assert count(row) - count('baseline') == np.sum(MORE[row])


@pytest.mark.parametrize('row', MORE)
def test_a_row_differs_from_the_baseline_in_its_backbone(row):
    cfg, baseline = read(row), read('baseline')
    check_config(cfg)
    check_monitors(cfg)
    cfg.model.backbone = baseline.model.backbone
    assert cfg.to_dict() == baseline.to_dict()


@pytest.mark.parametrize('row', [name for name, row in ROWS.items() if row.paper])
def test_switches_are_those_of_the_rows_on_imagenet(row):
    """But for the image's size, and for what is smaller."""
    nano = read(row).model.backbone
    tiny = Config.fromfile(ROWS[row].paper.config).model.backbone
    for backbone in (nano, tiny):
        for key in ('arch', 'drop_path_rate'):
            backbone.pop(key, None)
    if row == 'ape':
        assert (nano.pop('ape'), tiny.pop('ape')) == (32, 224)
    assert nano.to_dict() == tiny.to_dict()


def test_no_weight_decay_of_rates_and_tables():
    for row, last in (('forget-gate', 'A_log'), ('ape', 'ape'), ('shortcut', 'D')):
        cfg = read(row)
        model = MODELS.build(cfg.model)
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
        decays = {
            id(p): group['weight_decay']
            for group in optimizer.param_groups
            for p in group['params']
        }
        named = dict(model.named_parameters())
        found = [decays[id(p)] for n, p in named.items() if n.split('.')[-1] == last]
        assert found == [0] * len(C)
        assert decays[id(named['backbone.layers.0.blocks.0.proj.weight'])] == 0.05


# Writes what a training of an epoch leaves. Its accuracy depends on row and seed.
STAND_IN = """
import json, os, signal, sys, time, zlib
from pathlib import Path

config, *arguments = sys.argv[1:]
work_dir = Path(arguments[arguments.index('--work-dir') + 1])
seed = int(arguments[arguments.index('--seed') + 1])
calls = Path(__file__).parent / 'calls'
calls.open('a').write(f'{Path(config).stem} {seed} {" ".join(arguments[4:])}\\n')
{extra}
folder = work_dir / f'2026010{len(list(work_dir.glob("2*"))) + 1}_000000' / 'vis_data'
folder.mkdir(parents=True)
run = dict(
    config=Path(config).stem, unit='epoch', length=1, resumed=False, checkpoint=None,
    test_time_augmentation=False, averaged_weights=False,
)
(folder / 'run.json').write_text(json.dumps(run))
top1 = zlib.crc32(f'{config} {seed}'.encode()) % 10000 / 100
lines = [dict(loss=1.0, epoch=1, iter=1, step=1)]
lines += [{'accuracy/top1': top1, 'accuracy/top5': 99.0, 'step': 1}]
(folder / 'scalars.json').write_text('\\n'.join(map(json.dumps, lines)))
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Put a script in the place of the trainings; returns how to set its middle."""
    path = tmp_path / 'stand_in.py'

    def install(extra: str = '') -> Path:
        path.write_text(STAND_IN.replace('{extra}', extra))
        return tmp_path / 'calls'

    install()
    command = [sys.executable, '-S', str(path)]
    monkeypatch.setattr(
        ablation, 'train_command', lambda config, _: [*command, str(config)]
    )
    return install


def calls_of(path: Path) -> list:
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [tuple(line.split(' ', 2)) for line in lines]


@pytest.fixture
def study(call_tool, digits_imagenet, tmp_path):
    def call(*arguments, **options):
        return call_tool(
            TOOL, '--repeats', 2, '--device', 'cpu', '--out', tmp_path / 'out',
            '--cfg-options', *without_workers(digits_imagenet, 'train', 'val')[::3],
            'train_cfg.max_epochs=1', 'train_dataloader.batch_size=2',
            *arguments, **options,
        )  # fmt: skip

    return call


def logged(out: Path, rows, seeds) -> dict:
    """Accuracies of the logs by row."""
    return {
        row: [
            json.loads(line)['accuracy/top1']
            for seed in range(seeds)
            for log in sorted((out / row / f'seed_{seed}').glob('*/vis_data/s*.json'))
            for line in log.read_text().splitlines()[-1:]
        ]
        for row in rows
    }


def check_outputs(out: Path, printed: str, rows, seeds: int) -> None:
    """Compare table and JSON with the logs and the metafile."""
    top1 = logged(out, rows, seeds)
    assert [len(found) for found in top1.values()] == [seeds] * len(rows)
    record = json.loads((out / 'ablation.json').read_text())
    cells = [
        [x.strip() for x in line.split('|')[1:-1]] for line in printed.splitlines()
    ]
    table = {line[0]: line[1:] for line in cells if len(line) == 9}
    assert [row['name'] for row in record['rows']] == list(rows)
    base = statistics.mean(top1[rows[0]])
    published = {
        name: published_models()[f'la-swin-t{suffix}_8xb128_in1k']
        for name, suffix in (('baseline', ''), ('lepe', '_lepe'))
    }
    for row in record['rows']:
        values = top1[row['name']]
        mean, spread = statistics.mean(values), np.std(values, ddof=1)
        assert list(row['top1'].values()) == values
        assert row['mean'] == pytest.approx(mean)
        assert row['deviation'] == pytest.approx(spread)
        assert row['parameters'] == count(row['name'])
        line = table[row['title']]
        assert line[0] == f'{count(row["name"]):,}'
        assert line[1] == f'{mean:.1f} ± {spread:.1f}'
        paper = published[row['name']]
        assert line[5] == str(paper.metrics['Top 1 Accuracy'])
        assert line[7] == f'{paper.paper_throughput / 1152:.2f}x'
        for mode, cell in (('infer', line[3]), ('train', line[4])):
            assert cell == f'{row["speed"][mode]["median"]:.2f}x'
        if row['name'] == rows[0]:
            assert line[2] == line[6] == ''
            assert row['speed']['infer']['median'] == 1
            continue
        error = math.sqrt((spread**2 + np.var(top1[rows[0]], ddof=1)) / seeds)
        assert line[2] == f'{mean - base:+.1f} ± {error:.1f}'
        assert line[6] == f'{paper.metrics["Top 1 Accuracy"] - 77.6:+.1f}'
        assert 0.1 < row['speed']['train']['median'] < 10
    report = (out / 'ablation.md').read_text()
    assert printed[printed.index('| Row') :].split('\n\n')[0] in report
    assert cv2.imread(str(out / 'ablation.png')).std() > 10


def test_study(study, stand_in, tmp_path):
    calls = stand_in()
    result = study('--rows', 'lepe', '--seeds', 2)
    trained = calls_of(calls)
    # Every row has the first seed before any has the second.
    names = ['la-swin-nano_digits', 'la-swin-nano_lepe_digits']
    assert [x[:2] for x in trained] == [(n, s) for s in '01' for n in names]
    assert all('--resume --cfg-options ' in x[2] for x in trained)
    assert all('train_cfg.max_epochs=1' in x[2] for x in trained)
    check_outputs(tmp_path / 'out', result.stdout, ['baseline', 'lepe'], 2)

    # What is there is not trained again; another seed is.
    result = study('--rows', 'lepe', '--seeds', 3)
    assert [x[:2] for x in calls_of(calls)] == [(n, '2') for n in names]
    check_outputs(tmp_path / 'out', result.stdout, ['baseline', 'lepe'], 3)

    # One seed has no deviation.
    study('--rows', 'lepe', '--seeds', 1)
    assert calls_of(calls) == []
    record = json.loads((tmp_path / 'out/ablation.json').read_text())
    assert [row['deviation'] for row in record['rows']] == [None, None]
    assert [row['error'] for row in record['rows']] == [None, None]
    assert record['budget']['length'] == '1 epochs'

    other = study(
        '--rows', 'lepe', '--cfg-options', 'train_dataloader.batch_size=7', check=False
    )
    assert other.returncode == 1
    assert 'another budget: batch per process was 2, and is 7' in other.stderr
    assert calls_of(calls) == []


def test_a_run_that_fails_is_named_and_others_go_on(study, stand_in, tmp_path):
    calls = stand_in("if 'lepe' in config: sys.exit('No such attention.')")
    result = study('--rows', 'rope', 'lepe', '--seeds', 1, check=False)
    assert result.returncode == 1
    log = tmp_path / 'out/lepe/seed_0.log'
    line = f'lepe, seed 0: No such attention. ({log})'
    assert f'Failed: {line}' in result.stdout
    record = json.loads((tmp_path / 'out/ablation.json').read_text())
    assert [row['name'] for row in record['rows']] == ['baseline', 'rope']
    assert record['failed'] == [line]
    assert line in (tmp_path / 'out/ablation.md').read_text()
    calls_of(calls)
    stand_in()
    study('--rows', 'rope', 'lepe', '--seeds', 1)
    assert [x[0] for x in calls_of(calls)] == ['la-swin-nano_lepe_digits']


def test_without_the_baseline_there_is_no_table(study, stand_in):
    stand_in("if 'lepe' not in config: sys.exit('It broke.')")
    result = study('--rows', 'lepe', '--seeds', 1, check=False)
    assert result.returncode == 1
    assert 'Without the baseline there is no table. baseline, seed 0: It broke.' in (
        result.stderr
    )


def test_an_unfinished_run_is_run_again(stand_in, tmp_path):
    (row,) = ablation.digits_rows([])
    stand_in('time.sleep(0)')
    assert ablation.train([row], 1, tmp_path / 'out') == []
    (log,) = (tmp_path / 'out').glob('*/seed_0/*/vis_data/scalars.json')
    log.write_text(log.read_text().splitlines()[0])
    calls_of(tmp_path / 'calls')
    assert ablation.train([row], 1, tmp_path / 'out') == []
    assert len(calls_of(tmp_path / 'calls')) == 1


def test_runs_at_a_time(stand_in, tmp_path):
    """Each run waits until both have begun."""
    stand_in(
        'end = time.monotonic() + 30\n'
        'while len(calls.read_text().splitlines()) < 2:\n'
        '    assert time.monotonic() < end\n'
        '    time.sleep(0.01)\n'
    )
    rows = ablation.digits_rows(['lepe'])
    assert ablation.train(rows, 1, tmp_path / 'out', jobs=2) == []


def test_sigterm_ends_the_runs(stand_in, tmp_path):
    stand_in(
        'def stop(*_):\n'
        "    calls.write_text('stopped')\n"
        '    sys.exit(143)\n'
        'signal.signal(signal.SIGTERM, stop)\n'
        'os.kill(os.getppid(), signal.SIGTERM)\n'
        'time.sleep(30)\n'
    )
    with pytest.raises(SystemExit) as end:
        ablation.train(ablation.digits_rows([]), 1, tmp_path / 'out')
    assert end.value.code == 143
    assert (tmp_path / 'calls').read_text() == 'stopped'


@pytest.mark.parametrize(
    'arguments, error',
    [
        (['--rows', 'lepi'], "Unknown row 'lepi'. There are: baseline, input-gate, "),
        (['--seeds', 0], '--seeds must be at least 1, got 0.'),
        (['--jobs', 0], '--jobs must be at least 1, got 0.'),
        (['--configs', 'no.py'], 'Config not found: no.py.'),
        (['--configs', 'a/b.py', 'c/b.py'], '--configs has b twice.'),
        (
            ['--configs', *(f'{FOLDER}/la-swin-{x}.py' for x in
                            ('nano_digits', 't_8xb128_in1k'))],
            'All rows need one budget: learning rate is 0.0015 in ',
        ),
    ],
)  # fmt: skip
def test_errors(study, stand_in, arguments, error):
    calls = stand_in()
    result = study(*arguments, check=False)
    assert result.returncode == 1
    assert f'Error: {error}' in result.stderr
    assert calls_of(calls) == []


def test_configs_of_ones_own(study, stand_in, tmp_path):
    config = tmp_path / 'my_attention.py'
    config.write_text(
        f"_base_ = '{FOLDER}/la-swin-nano_digits.py'\n"
        "model = dict(backbone=dict(token_mixer=dict(feature_map='relu')))\n"
    )
    baseline = FOLDER / 'la-swin-nano_digits.py'
    output = study('--configs', baseline, config, '--seeds', 1).stdout
    assert '| la-swin-nano_digits' in output
    assert re.search(r'\| my_attention +\| 1,427,530 ', output)
    assert (tmp_path / 'out/my_attention/seed_0').is_dir()


def test_data_are_made_if_they_are_missing(call_tool, stand_in, monkeypatch, tmp_path):
    monkeypatch.setattr(ablation, 'DIGITS', dict(train=20, val=10, size=32))
    call_tool(
        TOOL, '--rows', 'ape', '--seeds', 1, '--repeats', 1, '--device', 'cpu',
        '--out', 'out', cwd=tmp_path,
    )  # fmt: skip
    made = json.loads((tmp_path / 'data/digits_ablation/digits.json').read_text())
    assert (made['layout'], made['train'], made['size']) == ('imagenet', 20, 32)
    report = (tmp_path / 'out/ablation.md').read_text()
    assert 'layout imagenet, seed 0, train 20, val 10, size 32' in report


@pytest.mark.slow
def test_real_runs(run_tool, digits_imagenet, tmp_path):
    """Four trainings, and a second call that has nothing to train."""
    out = tmp_path / 'out'
    command = [
        'python', TOOL, '--rows', 'lepe', '--seeds', 2, '--jobs', 2, '--repeats', 2,
        '--device', 'cpu', '--out', out, '--cfg-options',
        *without_workers(digits_imagenet, 'train', 'val')[::3],
        'train_cfg.max_epochs=1', 'train_cfg.val_interval=1',
        'train_dataloader.batch_size=10',
    ]  # fmt: skip
    output = run_tool(*command).stdout
    check_outputs(out, output, ['baseline', 'lepe'], 2)
    before = {path: path.stat().st_mtime_ns for path in out.glob('*/seed_*.log')}
    assert len(before) == 4
    output = run_tool(*command).stdout
    check_outputs(out, output, ['baseline', 'lepe'], 2)
    assert {path: path.stat().st_mtime_ns for path in before} == before

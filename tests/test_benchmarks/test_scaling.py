# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The arithmetic of scaling, by other arithmetic and by things that exist."""

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from benchmarks.peak_memory import largest_size
from benchmarks.scaling import (
    CASES,
    IMAGENET,
    Machine,
    Weights,
    count_weights,
    plan,
    report,
    sent_bytes,
)
from mlla_mm.engine import batch_size
from mlla_mm.evaluation.published import published_models
from mlla_mm.reproducible.resume import newest_checkpoint

from ..nano import CONFIGS, NANO
from ..processes import ROOT

for package in ('mmdet', 'mmseg', 'mmpretrain'):
    pytest.importorskip(package)

TOOL = 'tools/analysis_tools/scaling.py'


def config(case):
    return Config.fromfile(CONFIGS / case.config)


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_published_parameters(case):
    published = [
        model.parameters
        for model in published_models().values()
        if str(model.config).endswith(case.config)
    ]
    found = count_weights(config(case))
    assert found.parameters == pytest.approx(published[0], rel=5e-3)
    assert found.averaged == case.config.startswith('classification')


def ring(chunks):
    """An all-reduce of one number per chunk: what each process sends, and the sums."""
    count = len(chunks)
    values, sent = [list(x) for x in chunks], [0] * count
    for add in (True, False):
        for step in range(count - 1):
            moves = []
            for rank in range(count):
                chunk = (rank - step + (0 if add else 1)) % count
                moves.append((rank, chunk, values[rank][chunk]))
                sent[rank] += 1
            for rank, chunk, value in moves:
                target = values[(rank + 1) % count]
                target[chunk] = target[chunk] + value if add else value
    return values, sent


@pytest.mark.parametrize('count', [2, 3, 8, 32])
def test_ring(count):
    """In a ring that really adds up, each process sends as much as the formula says."""
    chunks = [[rank * 100 + i for i in range(count)] for rank in range(count)]
    values, sent = ring(chunks)
    assert values == [[sum(column) for column in zip(*chunks)]] * count
    assert sent == [pytest.approx(sent_bytes(count, count))] * count
    assert sent_bytes(100, 1) == 0


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_rates_are_those_of_a_run(case):
    """Of ``--auto-scale-lr`` on as many processes, and of the recipe itself."""
    weights = Weights(1000, 10, False)
    recipe = config(case)
    own = plan(config(case), case.data, 100, 8, weights)
    assert own.total_batch == recipe.auto_scale_lr.base_batch_size
    assert own.learning_rate == pytest.approx(recipe.optim_wrapper.optimizer.lr)
    cfg = config(case)
    batch_size.settle(cfg, 32, scale=True)
    more = plan(recipe, case.data, 100, 32, weights)
    assert more.learning_rate == pytest.approx(cfg.optim_wrapper.optimizer.lr)
    assert more.learning_rate == pytest.approx(4 * own.learning_rate)


def test_plan():
    """On round numbers: 1000 images/s on each of 16 GPUs, batches of 128."""
    data = IMAGENET._replace(file_bytes=1e5, input_bytes=150_000, core_speed=300)
    machine = Machine(gpus=8, inside=100, between=10, disk=2)
    weights = Weights(25_000_000, 0, False)
    cfg = config(CASES[0])
    x = plan(cfg, data, 1000, 16, weights, machine)
    assert (x.total_batch, x.update, x.images) == (2048, 0.128, 16000)
    assert x.files == pytest.approx(1600)  # 16,000 files of a tenth of a MB
    assert x.inputs == pytest.approx(150)
    assert x.cores == 4
    assert x.sent == pytest.approx(187.5)  # 15 of 16 parts of 100 MB, twice
    assert x.exchange == pytest.approx(0.01875)
    assert x.share == pytest.approx(0.01875 / (0.01875 + 0.128))
    # Within a machine the faster link counts.
    x = plan(cfg, data, 1000, 8, weights, machine)
    assert x.exchange == pytest.approx(0.175 / 100)


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_size_of_an_input(case):
    """That of the largest image of the recipe's pipeline."""
    width, height = largest_size(config(case))
    assert case.data.input_bytes == 3 * width * height


@pytest.mark.parametrize('averaged', [False, True])
def test_size_of_a_saved_checkpoint(averaged, digits_imagenet, tmp_path):
    cfg = Config.fromfile(NANO['mmpretrain'])
    if not averaged:
        cfg.default_hooks.mesa = dict(type='NoHook')
        cfg.model.mesa_weight = 0.0
    cfg.train_dataloader.update(batch_size=4, num_workers=0, persistent_workers=False)
    cfg.train_dataloader.dataset.update(data_root=str(digits_imagenet), indices=4)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    cfg.default_hooks.checkpoint.save_best = None
    cfg.train_cfg.max_epochs = 1
    weights = count_weights(cfg)
    cfg.work_dir = str(tmp_path)
    Runner.from_cfg(cfg).train()
    path = newest_checkpoint(tmp_path)
    content = torch.load(path, map_location='cpu', weights_only=False)
    assert ('state_dict_ema' in content) == weights.averaged == averaged
    size = path.stat().st_size
    # Names and places of hundreds of tensors, and the state of the run.
    assert weights.checkpoint_bytes < size < 1.1 * weights.checkpoint_bytes
    other = weights._replace(averaged=not averaged).checkpoint_bytes
    assert abs(other - size) > 2 * abs(weights.checkpoint_bytes - size)


def test_the_page_has_the_tables():
    page = (ROOT / 'docs' / 'scaling.md').read_text()
    assert report() in page


def test_the_tool(call_tool):
    output = call_tool(
        TOOL, '--models', 'MLLA-T', '--gpus', 16, '--model-speed', 1000,
        '--core-speed', 300, '--between', 10, '--disk', 2,
    ).stdout  # fmt: skip
    rows = [[x.strip() for x in line.split('|')[1:-1]] for line in output.splitlines()]
    (data,) = (row for row in rows if len(row) == 9 and row[1] == '16')
    assert data[2:5] == ['2,048', '0.002', '16,000'] and data[7] == '4'
    (network,) = (row for row in rows if len(row) == 6 and row[1] == '16')
    # 24.39 M parameters of four bytes, 15 of 16 parts of them twice, at 10 GB/s.
    assert network[2:5] == ['128.0', '183', '18.29']


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--models', 'MLLA-X'], ['MLLA-X', 'MLLA-T']),
        (['--gpus', '8', '0'], ['--gpus', '0']),
        (['--disk', '-1'], ['--disk', '-1']),
        (['--between', '0'], ['--between', '0']),
    ],
)
def test_errors(call_tool, arguments, words):
    result = call_tool(TOOL, *arguments, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith('Error: ')
    assert all(word in result.stderr for word in words)

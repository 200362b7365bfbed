# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import copy
import csv
from pathlib import Path

import pytest
import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import PARAM_SCHEDULERS

from mlla_mm.engine.schedulers import WarmupCosineLR

CSV = Path(__file__).parents[1] / 'data' / 'imagenet_learning_rate.csv'
CONFIG = dict(
    type='WarmupCosineLR',
    warmup=20,
    begin=0,
    end=300,
    by_epoch=True,
    convert_to_iter_based=True,
)


def recorded(model: str) -> dict:
    with CSV.open() as file:
        rows = [row for row in csv.DictReader(file) if row['model'] == model]
    rates = {int(row['iteration']): float(row['learning_rate']) for row in rows}
    return dict(
        rates=rates,
        base=5e-4 * int(rows[0]['total_batch_size']) / 512,
        epoch_length=int(rows[0]['iterations_per_epoch']),
    )


def build(base: float, epoch_length: int):
    groups = [
        dict(params=[torch.nn.Parameter(torch.zeros(1))]),
        # Layer-wise decay makes such groups.
        dict(params=[torch.nn.Parameter(torch.zeros(1))], lr=base / 2),
    ]
    wrapper = OptimWrapper(torch.optim.AdamW(groups, lr=base))
    scheduler = PARAM_SCHEDULERS.build(
        copy.deepcopy(CONFIG),
        default_args=dict(optimizer=wrapper, epoch_length=epoch_length),
    )
    return wrapper, scheduler


def assert_rates(wrapper, expected: float) -> None:
    rate, of_half = (group['lr'] for group in wrapper.optimizer.param_groups)
    assert rate == pytest.approx(expected, rel=1e-6)
    assert of_half == pytest.approx(expected / 2, rel=1e-6)


@pytest.mark.filterwarnings('ignore:Detected call of:UserWarning')
def test_rates_are_the_authors():
    record = recorded('mlla-t')
    wrapper, scheduler = build(record['base'], record['epoch_length'])
    assert isinstance(scheduler, WarmupCosineLR)
    last = max(record['rates'])
    assert last == 300 * record['epoch_length'] - 1
    for iteration in range(last + 1):
        if iteration in record['rates']:
            assert_rates(wrapper, record['rates'][iteration])
        scheduler.step()


@pytest.mark.parametrize('model', ['mlla-t', 'mlla-s', 'mlla-b'])
def test_rates_after_resuming_are_the_authors(model):
    record = recorded(model)
    setting = record['base'], record['epoch_length']
    for iteration, expected in record['rates'].items():
        wrapper, scheduler = build(*setting)
        saved = scheduler.state_dict(), wrapper.state_dict()
        saved[0].update(last_step=max(iteration - 2, 0))
        # A resumed run builds optimiser and schedule again, and loads their states.
        wrapper, scheduler = build(*setting)
        wrapper.load_state_dict(saved[1])
        scheduler.load_state_dict(saved[0])
        for _ in range(min(iteration, 2)):
            scheduler.step()
        assert_rates(wrapper, expected)


def test_by_epoch_without_warmup():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = WarmupCosineLR(optimizer, warmup=0, end=4, min_ratio=0.0)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    # cos(pi t / 4) for t = 0, 0, 1, 2
    assert rates == pytest.approx([1, 1, 0.5 + 0.5**1.5, 0.5])


@pytest.mark.parametrize('warmup', [-1, 11])
def test_bad_warmup(warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match='between 0 and the 10 steps'):
        WarmupCosineLR(optimizer, warmup=warmup, end=10)

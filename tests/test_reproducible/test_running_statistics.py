# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""A recipe of four processes on four, on two and on one."""

import pytest
import torch

from .test_preemption import EPOCHS, contents, train

# The processes' images differ, and so do their statistics, which EMAHook averages, too.
SETTING = dict(
    EPOCHS,
    images=16,
    hooks=[
        dict(type='SyncBuffersBeforeSaveHook'),
        dict(type='EMAHook', momentum=0.1, update_buffers=True),
    ],
)
RULES = ('mean', 'first')
RECIPE = 4
SCRIPT = """
import sys
from mmengine.config import Config
from mmengine.dist import get_world_size
from mlla_mm.engine import launch
from tests.test_reproducible.test_running_statistics import RECIPE, RULES, train_by

cfg = Config(dict(
    launcher='pytorch', model=dict(), env_cfg=dict(dist_cfg=dict(timeout=60))
))
launch.set_up(cfg)
for rule in RULES:
    train_by(
        rule,
        f'{sys.argv[1]}/{rule}',
        micro_batches=RECIPE // get_world_size(),
        more=dict(launcher='pytorch', cfg=cfg),
    )
launch.tear_down()
"""


def train_by(rule, folder, micro_batches, **options):
    train_cfg = dict(
        SETTING['train_cfg'], running_statistics=rule, micro_batches=micro_batches
    )
    train(folder, [], **{**SETTING, 'train_cfg': train_cfg, **options})


@pytest.fixture(scope='module')
def run(run_tool, tmp_path_factory):
    """The tensors of the last checkpoint, by rule, for a number of processes."""
    script = tmp_path_factory.mktemp('script') / 'script.py'
    script.write_text(SCRIPT)

    def get(processes):
        folder = tmp_path_factory.mktemp('run')
        if processes == 1:
            for rule in RULES:
                train_by(rule, folder / rule, micro_batches=RECIPE)
        else:
            run_tool('python', script, folder, processes=processes)
        return {rule: contents(folder / rule)[0] for rule in RULES}

    return get


@pytest.fixture(scope='module')
def recipe(run):
    return run(RECIPE)


@pytest.mark.parametrize('processes', [1, 2])
def test_fewer_processes_keep_the_statistics(recipe, run, processes):
    """Weights, momenta, statistics and the average of all."""
    found = run(processes)
    for rule in RULES:
        for key, value in recipe[rule].items():
            # EMAHook saves the plain weights as 'module.'. With the mean, its average
            # has the first process's own statistics.
            if rule == 'first' or 'running_' not in key or key.startswith('module.'):
                torch.testing.assert_close(
                    found[rule][key], value, msg=f'{rule}: {key}'
                )


def test_the_rules_differ_in_statistics_alone(recipe):
    mean, first = recipe['mean'], recipe['first']
    for key, value in mean.items():
        assert torch.equal(first[key], value) == ('running_' not in key), key

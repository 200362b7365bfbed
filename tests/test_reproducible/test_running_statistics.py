# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The recipe on two real processes beside one that stands for both."""

import pytest
import torch

from .test_preemption import EPOCHS, contents, train

# Their images differ, and so do their statistics, which the hook averages, too.
SETTING = dict(
    EPOCHS,
    images=12,
    hooks=[
        dict(type='SyncBuffersBeforeSaveHook'),
        dict(type='EMAHook', momentum=0.1, update_buffers=True),
    ],
)
RULES = ('mean', 'first')
SCRIPT = """
import sys
from mmengine.config import Config
from mlla_mm.engine import launch
from tests.test_reproducible.test_running_statistics import RULES, SETTING, train_by

cfg = Config(dict(
    launcher='pytorch', model=dict(), env_cfg=dict(dist_cfg=dict(timeout=30))
))
launch.set_up(cfg)
for rule in RULES:
    train_by(rule, f'{sys.argv[1]}/{rule}', more=dict(launcher='pytorch', cfg=cfg))
launch.tear_down()
"""


def train_by(rule, folder, micro_batches=1, **options):
    train_cfg = dict(
        SETTING['train_cfg'], running_statistics=rule, micro_batches=micro_batches
    )
    train(folder, [], **{**SETTING, 'train_cfg': train_cfg, **options})


@pytest.fixture(scope='module')
def recipe(run_tool, tmp_path_factory):
    """The last checkpoints of the run on two processes, by rule."""
    folder = tmp_path_factory.mktemp('recipe')
    (folder / 'script.py').write_text(SCRIPT)
    run_tool('python', folder / 'script.py', folder, processes=2)
    return {rule: contents(folder / rule)[0] for rule in RULES}


@pytest.mark.parametrize('rule', RULES)
def test_micro_batches_stand_for_processes(recipe, tmp_path, rule):
    """Weights, momenta, statistics and the average of all."""
    train_by(rule, tmp_path, micro_batches=2)
    found, _ = contents(tmp_path)
    assert found.keys() == recipe[rule].keys()
    for key, value in recipe[rule].items():
        # EMAHook saves the plain weights as 'module.'. Of its average, the first
        # process's has that process's own statistics.
        if rule == 'first' or 'running_' not in key or key.startswith('module.'):
            torch.testing.assert_close(found[key], value)


def test_the_rules_differ_in_statistics_alone(recipe):
    mean, first = recipe['mean'], recipe['first']
    for key, value in mean.items():
        assert torch.equal(first[key], value) == ('running_' not in key), key

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Tools answer before they import what takes seconds."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cases
from benchmarks.models import DEFAULT_MODELS
from mlla_mm.checks.published import PUBLISHED
from mlla_mm.engine.launch import LAUNCHERS
from mlla_mm.export import FORMATS

from ..processes import ROOT, load_tool

TOOLS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob('tools/**/*.py'))
TOOLS.remove('tools/arguments.py')

# Runs each tool as a script, in a process without the heavy packages.
SCRIPT = """
import contextlib, io, json, runpy, sys
from pathlib import Path

HEAVY = {'torch', 'torchvision', 'mlla_mm', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'}


class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.partition('.')[0] not in HEAVY, name


def run(tool, argument):
    printed = io.StringIO()
    sys.argv, sys.path[0] = [tool, argument], str(Path(tool).parent)
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            runpy.run_path(tool, run_name='__main__')
        except SystemExit as end:
            return end.code, printed.getvalue()
        except AssertionError as error:
            return f'imports {error}', printed.getvalue()
    return None, printed.getvalue()


sys.meta_path.insert(0, Refuse())
answers = {
    tool: [run(tool, argument) for argument in ('--help', '--no-such-option')]
    for tool in sys.argv[1:]
}
print(json.dumps(answers))
"""


@pytest.fixture(scope='module')
def answers():
    command = [sys.executable, '-c', SCRIPT, *TOOLS]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return json.loads(result.stdout)


@pytest.mark.parametrize('tool', TOOLS)
def test_help_and_wrong_options_import_nothing_heavy(answers, tool):
    usage = f'usage: {Path(tool).name}'
    (status, text), (wrong, message) = answers[tool]
    assert status == 0, status
    assert text.startswith(usage)
    assert wrong == 2, wrong
    assert message.startswith(usage) and ' error: ' in message


@pytest.fixture
def option(monkeypatch):
    """An option of a tool, from its parser."""
    parsers = []

    def parse_args(self, *args, **kwargs):
        parsers.append(self)
        return argparse.Namespace()

    def get(tool, name) -> argparse.Action:
        load_tool(tool).parse_args([])
        return parsers[-1]._option_string_actions[name]

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
    monkeypatch.syspath_prepend(ROOT / 'tools')
    return get


@pytest.mark.parametrize(
    'tool, name, expected',
    [
        ('tools/train.py', '--launcher', LAUNCHERS),
        ('tools/test.py', '--launcher', LAUNCHERS),
        ('tools/export.py', '--format', tuple(FORMATS)),
        ('tools/analysis_tools/benchmark.py', '--mode', cases.MODES),
        ('tools/analysis_tools/benchmark.py', '--dtype', cases.DTYPES),
    ],
)
def test_choices_are_the_packages(option, tool, name, expected):
    """Tools cannot read them there, as that would import it."""
    assert option(tool, name).choices == expected


def test_defaults_are_the_packages(option):
    tool = 'tools/analysis_tools/benchmark.py'
    assert option(tool, '--models').default == DEFAULT_MODELS
    assert set(option(tool, '--shape').default) <= set(cases.PRESETS)
    text = option(tool, '--shape').help
    for name, (height, width) in cases.PRESETS.items():
        assert f'{name} ({height}x{width})' in text
    first, *_, last = cases.SWEEP_SIDES
    assert f'{first} to {last}' in option(tool, '--sweep').help


def test_data_sets_are_the_packages():
    checked = load_tool('tools/dataset_tools/check_dataset.py').DATASETS
    assert checked == tuple(PUBLISHED)

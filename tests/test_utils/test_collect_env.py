# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from mlla_mm.compat import mmcv_ext
from mlla_mm.compat.stack import Stack, collect_stack
from mlla_mm.utils.collect_env import collect_env, format_problems, format_table

ROOT = Path(__file__).parents[2]


def run(extra_path=None, options=()):
    path = os.pathsep.join(str(p) for p in (extra_path, ROOT) if p)
    return subprocess.run(
        [sys.executable, *options, '-m', 'mlla_mm.utils.collect_env'],
        env={**os.environ, 'PYTHONPATH': path},
        capture_output=True,
        text=True,
    )


def read_table(text):
    lines = text.split('\n\n')[0].splitlines()
    return dict(line.split('  ', 1) for line in lines)


def test_report_of_this_environment():
    result = run()
    table = {k: v.strip() for k, v in read_table(result.stdout).items()}
    assert table['PyTorch'] == torch.__version__
    for found in collect_stack().packages.values():
        for name in found:
            assert f'{metadata.version(name)} ({name})' in result.stdout
    ops = 'stand-in' if mmcv_ext.is_stand_in() else 'compiled ('
    assert table['mmcv ops'].startswith(ops)
    assert table['CUDA'].startswith('available') == torch.cuda.is_available()
    # The tests could not run in it otherwise.
    assert result.stdout.endswith('\n\nNo problem found.\n')
    assert (result.returncode, result.stderr) == (0, '')


def test_a_dependency_of_mmdet_is_missing(tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(
        'import sys\n'
        'class Refuse:\n'
        '    def find_spec(self, name, path=None, target=None):\n'
        '        if name == "shapely":\n'
        '            message = f"No module named {name!r}"\n'
        '            raise ModuleNotFoundError(message, name=name)\n'
        'sys.meta_path.insert(0, Refuse())\n'
    )
    result = run(tmp_path)
    assert result.returncode == 1
    _, problems = result.stdout.split('Problems found:')
    # mmseg and mmpretrain do without it.
    assert problems.split() == [
        *(
            '1. mmdet.apis cannot be imported: ModuleNotFoundError: No module named '
            "'shapely'"
        ).split(),
        *'pip install --force-reinstall --no-deps --no-cache-dir'.split(),
        f'shapely=={metadata.version("shapely")}',
    ]


def test_nothing_is_installed():
    result = run(options=['-S'])
    assert result.returncode == 1
    assert read_table(result.stdout)['mmcv ops'].strip() == 'not installed'
    for missing in ("No module named 'torch'", "No module named 'cv2'", 'mmengine'):
        assert missing in result.stdout.split('Problems found:')[1]
    assert result.stderr == ''


@pytest.mark.parametrize(
    'package, label',
    [('torch', 'PyTorch'), pytest.param('cv2', 'OpenCV', marks=pytest.mark.slow)],
)
def test_a_library_that_does_not_load(tmp_path, package, label):
    (tmp_path / package).mkdir()
    error = 'libsomething.so.1: cannot open shared object file'
    (tmp_path / package / '__init__.py').write_text(f'raise OSError({error!r})')
    result = run(tmp_path)
    assert (result.returncode, result.stderr) == (1, '')
    assert read_table(result.stdout)[label].strip() == 'does not import'
    # Once, not for each package that imports it.
    assert result.stdout.count(error) == 1


def test_importing_the_package_says_the_same(tmp_path):
    (tmp_path / 'torch.py').write_text('raise OSError("libc10.so is missing")')
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    result = subprocess.run(
        [sys.executable, '-c', 'import mlla_mm'],
        env={**os.environ, 'PYTHONPATH': path},
        capture_output=True,
        text=True,
    )
    assert 'PyTorch does not import: libc10.so is missing' in result.stderr
    assert 'pip install torch==' in result.stderr


def test_exit_status_of_a_broken_environment(tmp_path):
    # The records of both distributions, as after installing one over the other.
    for name in ('mmcv', 'onedl_mmcv'):
        record = tmp_path / f'{name}-2.1.0.dist-info'
        record.mkdir()
        (record / 'METADATA').write_text(
            f'Metadata-Version: 2.1\nName: {name}\nVersion: 2.1.0\n'
        )
    result = run(tmp_path, options=['-S'])
    assert result.returncode == 1, result.stderr
    assert 'onedl-mmcv and mmcv are installed on top of each other' in result.stdout
    assert 'pip uninstall -y onedl-mmcv mmcv' in result.stdout


def test_values_start_in_one_column():
    rows = collect_env(collect_stack())
    table = format_table(rows)
    columns = {
        line.index(value)
        for line, value in zip(table.splitlines(), rows.values())
        if value
    }
    assert columns == {max(map(len, rows)) + 2}


def test_report_of_an_environment_with_nothing_in_it():
    packages = {n: {} for n in ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')}
    rows = collect_env(Stack(packages=packages))
    assert rows['mmcv'] == rows['mmcv ops'] == 'not installed'
    assert rows['PyTorch'] == 'does not import'


def test_problems_are_numbered():
    text = format_problems(['first\n  mend it', 'second'])
    assert '1. first\n  mend it\n\n2. second' in text
    assert format_problems([]) == 'No problem found.'

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The package as a wheel installs it: MIM's configs and tools, outside the clone."""

import shutil
import subprocess
import sys
from importlib.metadata import PathDistribution

import pytest
from packaging.requirements import Requirement

from mlla_mm.compat.versions import EXTRAS, RUNTIME
from mlla_mm.version import __version__

from ..processes import ROOT

CONFIG = 'configs/classification/mlla-nano_digits.py'
CLASSIFIER = 'mlla-t_8xb128_in1k'
OPTIONS = [
    '--cfg-options',
    'train_cfg.max_epochs=1',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
    'test_dataloader.num_workers=0',
    'test_dataloader.persistent_workers=False',
]  # fmt: skip
# Folders of a clone that are no source.
NO_SOURCE = ('.git', '.venv', 'data', 'work_dirs', 'build', '*.egg-info')


def build(out):
    """What a wheel holds, in a folder, as setuptools lays it out for one."""
    subprocess.run(
        [
            sys.executable, 'setup.py', '--quiet', 'build',
            '--build-base', out / 'base', '--build-lib', out / 'lib',
        ],
        cwd=ROOT, check=True,
    )  # fmt: skip
    return out / 'lib'


def install_wheel(out):
    """A wheel by pip, with a build environment of its own."""
    source = out / 'source'
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NO_SOURCE))
    pip = [sys.executable, '-m', 'pip', '--quiet']
    subprocess.run([*pip, 'wheel', '--no-deps', '-w', out, source], check=True)
    wheel = next(out.glob('*.whl'))
    subprocess.run(
        [*pip, 'install', '--no-deps', '--target', out / 'lib', wheel], check=True
    )
    return out / 'lib'


@pytest.fixture(
    scope='module',
    params=[build, pytest.param(install_wheel, marks=pytest.mark.slow)],
)
def site(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp('installed'))


def files(folder):
    paths = (path.relative_to(folder) for path in folder.rglob('*') if path.is_file())
    return {str(path) for path in paths if '__pycache__' not in path.parts}


def test_configs_and_tools_are_there(site):
    mim = site / 'mlla_mm' / '.mim'
    assert files(mim / 'configs') == files(ROOT / 'configs')
    of_clones = {
        *('quickstart.sh', 'run_tests.sh', 'test_matrix.sh'),
        *('misc/setup_env.sh', 'misc/install_packages.py'),
    }
    assert files(mim / 'tools') == files(ROOT / 'tools') - of_clones
    wanted = {path for path in files(ROOT / 'benchmarks') if path[:4] != 'gpu/'}
    assert files(mim / 'benchmarks') == wanted
    assert (mim / 'model-index.yml').read_bytes() == (
        ROOT / 'model-index.yml'
    ).read_bytes()
    assert not (ROOT / 'mlla_mm' / '.mim').exists()


def test_metadata(tmp_path):
    """Half of it stands in pyproject.toml, half in setup.py."""
    command = [
        sys.executable,
        'setup.py',
        '--quiet',
        'egg_info',
        '--egg-base',
        tmp_path,
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    distribution = PathDistribution(tmp_path / 'mlla_mm.egg-info')
    metadata = distribution.metadata
    assert metadata['Name'].replace('-', '_') == 'mlla_mm'
    assert metadata['Version'] == __version__
    assert 'Apache-2.0' in (metadata['License'], metadata['License-Expression'])
    assert metadata['Requires-Python'] == '>=3.9'
    assert 'https://arxiv.org/abs/2405.16605' in metadata['Project-URL']
    assert metadata['Description-Content-Type'] == 'text/markdown'
    wanted = {}
    for line in distribution.requires:
        requirement = Requirement(line)
        extras = [x for x in EXTRAS if f'extra == "{x}"' in str(requirement.marker)]
        wanted.setdefault((*extras, None)[0], set()).add(requirement.name)
    expected = {
        extra: {Requirement(line).name for line in lines}
        for extra, lines in {None: RUNTIME, **EXTRAS}.items()
    }
    assert wanted == expected


@pytest.fixture
def run(site, run_tool, tmp_path):
    """Run a command outside the clone, with the installed package alone."""

    def run(*command):
        return run_tool(*command, env={'PYTHONPATH': str(site)}, cwd=tmp_path).stdout

    return run


def test_training_and_testing_outside_the_clone(site, run, digits_imagenet, tmp_path):
    pytest.importorskip('mmpretrain')
    mim = site / 'mlla_mm' / '.mim'
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'digits_imagenet').symlink_to(digits_imagenet)
    code = 'import importlib.util as x; print(x.find_spec("mlla_mm").origin)'
    found = run('python', '-c', code)
    assert found.strip() == str(site / 'mlla_mm' / '__init__.py')
    run('bash', mim / 'tools/dist_train.sh', mim / CONFIG, 1, *OPTIONS)
    checkpoint = tmp_path / 'work_dirs' / 'mlla-nano_digits' / 'epoch_1.pth'
    assert checkpoint.is_file()
    output = run('python', mim / 'tools/test.py', mim / CONFIG, checkpoint, *OPTIONS)
    assert 'accuracy/top1' in output


@pytest.mark.parametrize(
    'tool, arguments, printed',
    [
        (
            'benchmark.py',
            ['--models', 'plain-t', '--shape', '32x64', '--repeats', 1],
            '### backbone 32x64, batch 1, infer, float32',
        ),
        ('peak_memory.py', ['{mim}/' + CONFIG, '--batch-size', 2], '| 2 x 64 x 64 |'),
        (
            'plot_accuracy_latency.py',
            ['--models', CLASSIFIER, '--shape', 32, 32, '--repeats', 1],
            f'| {CLASSIFIER} | 24.4 M | 83.5 ',
        ),
    ],
)
def test_measuring_outside_the_clone(site, run, tool, arguments, printed):
    """The tools find ``benchmarks``, which is no part of the package."""
    pytest.importorskip('mmpretrain')
    mim = site / 'mlla_mm' / '.mim'
    arguments = [str(argument).format(mim=mim) for argument in arguments]
    command = ['python', mim / 'tools/analysis_tools' / tool, *arguments]
    assert printed in run(*command)

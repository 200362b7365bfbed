# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The set-up: what it installs where, and what it says when that fails."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from importlib import metadata

import pytest

from mlla_mm.compat.versions import EXTRAS, FORK, ORIGINAL, RUNTIME, TORCH

from ..processes import ROOT

SCRIPT = 'tools/misc/setup_env.sh'
OPENMMLAB = set(FORK)


@pytest.fixture(scope='module')
def tool():
    path = ROOT / 'tools' / 'misc' / 'install_packages.py'
    spec = importlib.util.spec_from_file_location('install_packages', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_choice(monkeypatch):
    for name in ('OPENMMLAB_STACK', 'UV', 'UV_DEFAULT_INDEX', 'UV_INDEX_URL'):
        monkeypatch.delenv(name, raising=False)


def distributions(packages):
    return {name: version for name, version in packages.values()}


def complete(tool, stack, *extras):
    """An environment with all of a stack."""
    lines = [line for extra in extras for line in EXTRAS[extra]]
    others = {tool.name_of(line): '1.0' for line in (*RUNTIME, *lines)}
    packages = FORK if stack == 'onedl' else ORIGINAL
    return {
        'torch': '2.4.0+cu121',
        'torchvision': '0.19',
        **others,
        **distributions(packages),
    }


@pytest.mark.parametrize('stack', ['onedl', 'openmmlab'])
def test_new_environment(tool, monkeypatch, stack):
    monkeypatch.setenv('OPENMMLAB_STACK', stack)
    plan = tool.make_plan({}, set(), own=True, tests=True)
    extras = {'tests', 'docs', stack}
    if stack == 'onedl':
        extras |= {'torch', 'export'}
    else:
        extras.add('torch21' if sys.version_info < (3, 12) else 'torch')
    expected = {line for extra in extras for line in EXTRAS[extra]} | set(RUNTIME)
    assert set(plan.requirements) == expected
    assert plan.clone
    assert plan.constraints == []
    assert plan.build_constraints == ['setuptools<70'] * (stack == 'openmmlab')


@pytest.mark.parametrize('torch', [None, '2.1.2+cu118', '2.2.0', '2.3.1', '2.11.0'])
def test_default_stack(tool, torch):
    """Not the fork where it cannot run: it needs Python 3.10 and NumPy 2."""
    old = torch in ('2.1.2+cu118', '2.2.0') or sys.version_info < (3, 10)
    found = {'torch': torch} if torch else {}
    assert tool.choose_stack(found) == ('openmmlab' if old else 'onedl')


def test_unknown_stack(tool, monkeypatch):
    monkeypatch.setenv('OPENMMLAB_STACK', 'mm3')
    with pytest.raises(SystemExit, match="'mm3'.* onedl and openmmlab"):
        tool.choose_stack({})


@pytest.mark.parametrize('stack', ['onedl', 'openmmlab'])
@pytest.mark.parametrize('other', ['onedl', 'openmmlab'])
def test_complete_environment(tool, monkeypatch, stack, other):
    """What is asked for does not matter where one is in use."""
    monkeypatch.setenv('OPENMMLAB_STACK', other)
    extras = (stack, 'tests', 'docs', *(['export'] if stack == 'onedl' else []))
    found = complete(tool, stack, *extras)
    plan = tool.make_plan(found, {*OPENMMLAB, 'cv2'}, own=False, tests=True)
    assert plan.requirements == []
    assert not plan.clone


@pytest.mark.parametrize('name', ['matplotlib', 'pytest-xdist', 'ftfy', 'setuptools'])
def test_one_package_is_missing(tool, name):
    found = complete(tool, 'openmmlab', 'openmmlab', 'tests', 'docs')
    del found[name]
    plan = tool.make_plan(found, {*OPENMMLAB, 'cv2'}, own=False, tests=True)
    assert list(map(tool.name_of, plan.requirements)) == [name]
    assert plan.title == name


def test_what_is_installed_stays(tool):
    """A part of the stack, in other versions than ours."""
    found = {
        'torch': '2.1.0+cu118',
        'mmengine': '0.10.1',
        'mmcv': '2.0.1',
        'numpy': '2.0',
    }
    plan = tool.make_plan(found, {'mmengine', 'mmcv', 'cv2'}, own=False, tests=False)
    names = list(map(tool.name_of, plan.requirements))
    assert {'mmdet', 'mmsegmentation', 'mmpretrain'} < set(names)
    assert not {'torch', 'mmengine', 'mmcv'} & set(names)
    # The bounds of those that are missing.
    assert {'numpy<2', 'setuptools<70'} < set(plan.requirements)
    assert set(plan.constraints) == {
        'torch==2.1.0+cu118',
        'mmengine==0.10.1',
        'mmcv==2.0.1',
    }


def test_package_without_metadata_is_there(tool):
    """A clone of mmdet on PYTHONPATH, say."""
    found = complete(tool, 'onedl', 'onedl')
    del found['onedl-mmdetection'], found['opencv-python']
    plan = tool.make_plan(found, {*OPENMMLAB, 'cv2'}, own=False, tests=False)
    assert plan.requirements == []


def test_pytorch_is_for_own_environments_alone(tool):
    found = complete(tool, 'onedl', 'onedl')
    del found['torchvision']
    plan = tool.make_plan(found, {*OPENMMLAB, 'cv2'}, own=False, tests=False)
    assert plan.requirements == []
    plan = tool.make_plan(found, {*OPENMMLAB, 'cv2'}, own=True, tests=False)
    assert plan.requirements == EXTRAS['torch']
    assert plan.clone
    assert TORCH[0] in plan.title


@pytest.mark.parametrize(
    'there, kept, dropped',
    [
        ([], 'opencv-python-headless', 'opencv-python'),
        (['opencv-python-headless'], 'opencv-python-headless', 'opencv-python'),
        (['opencv-python'], 'opencv-python', 'opencv-python-headless'),
    ],
)
def test_one_opencv(tool, there, kept, dropped):
    found = dict.fromkeys(there, '4.11.0.86')
    plan = tool.make_plan(found, set(), own=True, tests=False)
    requirements, overrides = tool.one_opencv(plan)
    names = list(map(tool.name_of, requirements))
    assert kept in names and dropped not in names
    assert list(map(tool.name_of, overrides)) == [dropped]
    # pip cannot, and is told what the package asks for.
    assert 'opencv-python' in map(tool.name_of, plan.requirements)


def test_two_opencvs_stay(tool):
    found = dict.fromkeys(tool.OPENCV, '4.11.0.86')
    plan = tool.make_plan(found, set(), own=True, tests=False)
    assert tool.one_opencv(plan) == (plan.requirements, [])


def test_indexes_of_pip_are_those_of_uv(tool, monkeypatch):
    monkeypatch.setenv('PIP_CONFIG_FILE', '/dev/null')
    monkeypatch.setenv('PIP_INDEX_URL', 'https://mirror.test/simple')
    monkeypatch.setenv('PIP_EXTRA_INDEX_URL', 'https://a.test https://b.test')
    assert tool.uv_environment() == dict(
        UV_DEFAULT_INDEX='https://mirror.test/simple',
        UV_INDEX='https://a.test https://b.test',
        UV_INDEX_STRATEGY='unsafe-best-match',
    )
    monkeypatch.setenv('UV_DEFAULT_INDEX', 'https://chosen.test')
    assert tool.uv_environment() == {}


def make_wheel(folder, version):
    """The smallest package there is."""
    info = f'tiny-{version}.dist-info'
    with zipfile.ZipFile(folder / f'tiny-{version}-py3-none-any.whl', 'w') as wheel:
        wheel.writestr('tiny.py', '')
        wheel.writestr(
            f'{info}/METADATA',
            f'Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n',
        )
        wheel.writestr(
            f'{info}/WHEEL',
            'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
        )
        wheel.writestr(f'{info}/RECORD', '')


@pytest.fixture
def index(tmp_path, monkeypatch):
    """What pip finds are two versions of a package, and it installs into a folder."""
    for version in ('1.0', '2.0'):
        make_wheel(tmp_path, version)
    monkeypatch.setenv('PIP_CONFIG_FILE', '/dev/null')
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path))
    monkeypatch.setenv('PIP_TARGET', str(tmp_path / 'site'))
    return tmp_path


def plan_of(tool, requirement, constraints=()):
    return tool.Plan('tiny', [requirement], False, list(constraints), [], None)


@pytest.mark.parametrize('uv', ['', 'false'])
def test_pip_takes_over(tool, index, monkeypatch, capsys, uv):
    monkeypatch.setenv('UV', uv)
    log = index / 'setup.log'
    tool.install(plan_of(tool, 'tiny', ['tiny==1.0']), log)
    (found,) = metadata.distributions(path=[str(index / 'site')])
    assert found.version == '1.0'
    lines = capsys.readouterr().out.splitlines()
    # A line for each that was tried, and one that says so.
    assert len(lines) == (3 if uv else 1)
    assert ('uv does not work' in lines[-2]) if uv else True
    assert 'by pip ... ' in lines[-1]
    assert 'Successfully installed tiny-1.0' in log.read_text()


def test_what_cannot_be_installed(tool, index, monkeypatch):
    monkeypatch.setenv('UV', '')
    log = index / 'setup.log'
    with pytest.raises(SystemExit) as error:
        tool.install(plan_of(tool, 'tiny==3.0'), log)
    assert 'No matching distribution found for tiny==3.0' in str(error.value)
    assert str(error.value).splitlines()[-1].startswith('Error: ')
    assert str(log) in str(error.value)


def test_uv_that_is_not_there(tool, tmp_path, capsys):
    log = tmp_path / 'setup.log'
    assert not tool.step('Trying', ['/not/there/uv', 'pip'], log)
    assert 'Trying ... failed' in capsys.readouterr().out
    assert '/not/there/uv' in log.read_text()


def test_check_again_after_changes(tool, tmp_path, monkeypatch):
    site = tmp_path / 'site'
    site.mkdir()
    monkeypatch.setattr(tool.sysconfig, 'get_path', lambda name: str(site))
    checked = tmp_path / 'checked'
    assert not tool.is_up_to_date(checked)
    checked.touch()
    assert tool.is_up_to_date(checked)
    os.utime(checked, (0, 0))
    assert not tool.is_up_to_date(checked)


def source(tmp_path, commands, **variables):
    return subprocess.run(
        ['bash', '-euc', f'source {SCRIPT} {commands}'],
        cwd=ROOT,
        env={
            'PATH': f'{sys.prefix}/bin:/usr/bin:/bin',
            'TMPDIR': str(tmp_path),
            **variables,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_no_python(tmp_path):
    venv = tmp_path / 'venv'
    result = source(tmp_path, '', MLLA_VENV=str(venv), PYTHON='python3.8 no_python')
    assert result.returncode != 0
    assert 'Error: no python3.8 no_python found' in result.stdout
    assert not venv.exists()


@pytest.mark.slow
def test_active_environment_is_left_alone(tmp_path):
    before = {d.metadata['Name']: d.version for d in metadata.distributions()}
    after = 'tests; echo "$PYTHONPATH"; python -c "import sys; print(sys.prefix)"'
    result = source(tmp_path, after, VIRTUAL_ENV=sys.prefix)
    assert result.returncode == 0, result.stdout
    *said, python_path, prefix = result.stdout.splitlines()
    if sys.prefix != str(ROOT / '.venv'):  # which is taken without a word
        assert said.pop(0).endswith(f'environment: {sys.prefix}')
    # Nothing where it was checked before.
    assert all(line.startswith('Checking') for line in said)
    assert (python_path, prefix) == (str(ROOT), sys.prefix)
    assert {d.metadata['Name']: d.version for d in metadata.distributions()} == before
    assert list(tmp_path.glob('*.log')) == []

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from dataclasses import replace
from importlib import metadata

import pytest

from mlla_mm.compat import stack as stack_module
from mlla_mm.compat.imports import ImportFailure
from mlla_mm.compat.stack import Stack, Unmet, collect_stack, find_problems

FORK = Stack(
    packages={
        'mmengine': {'onedl-mmengine': '0.10.12'},
        'mmcv': {'onedl-mmcv': '2.3.6'},
        'mmdet': {'onedl-mmdetection': '3.5.1'},
        'mmseg': {'onedl-mmsegmentation': '1.4.2'},
        'mmpretrain': {'onedl-mmpretrain': '1.3.6'},
    },
    versions={
        'torch': '2.11.0+cu130',
        'torchvision': '0.26.0+cu130',
        'numpy': '2.2.6',
        'cv2': '4.12.0',
    },
)
ORIGINAL = Stack(
    packages={
        'mmengine': {'mmengine': '0.10.7'},
        'mmcv': {'mmcv': '2.1.0'},
        'mmdet': {'mmdet': '3.3.0'},
        'mmseg': {'mmsegmentation': '1.2.2'},
        'mmpretrain': {'mmpretrain': '1.2.0'},
    },
    versions={
        'torch': '2.1.2',
        'torchvision': '0.16.2',
        'numpy': '1.26.4',
        'cv2': '4.11.0',
    },
)
STACKS = pytest.mark.parametrize('good', [FORK, ORIGINAL], ids=['fork', 'original'])


def with_packages(stack, **packages):
    return replace(stack, packages={**stack.packages, **packages})


def with_versions(stack, errors=None, **versions):
    versions = {**stack.versions, **versions}
    kept = {name: version for name, version in versions.items() if version}
    return replace(stack, versions=kept, import_errors=errors or {})


def the_problem(stack):
    problems = find_problems(stack)
    assert len(problems) == 1, problems
    return problems[0]


@STACKS
def test_tested_stacks_have_no_problem(good):
    assert find_problems(good) == []


def test_distribution_is_the_majority():
    assert FORK.distribution == 'onedl'
    assert ORIGINAL.distribution == 'openmmlab'
    mixed = with_packages(ORIGINAL, mmcv={'onedl-mmcv': '2.3.6'})
    assert mixed.distribution == 'openmmlab'


@pytest.mark.parametrize(
    'good, kept', [(FORK, 'onedl-mmcv==2.3.6'), (ORIGINAL, 'mmcv==2.1.0')]
)
def test_two_distributions_on_top_of_each_other(good, kept):
    both = {'onedl-mmcv': '2.3.6', 'mmcv': '2.1.0'}
    problem = the_problem(with_packages(good, mmcv=both))
    assert 'onedl-mmcv and mmcv are installed on top of each other' in problem
    assert 'pip uninstall -y onedl-mmcv mmcv\n' in problem
    assert problem.endswith(f'pip install --no-deps {kept}')


def test_mmcv_and_mmcv_lite_are_the_same_package():
    both = {'mmcv': '2.1.0', 'mmcv-lite': '2.1.0'}
    assert 'mmcv and mmcv-lite' in the_problem(with_packages(ORIGINAL, mmcv=both))
    assert not find_problems(with_packages(ORIGINAL, mmcv={'mmcv-lite': '2.1.0'}))


def test_missing_packages_are_named_once():
    problem = the_problem(with_packages(FORK, mmdet={}, mmseg={}))
    assert problem.startswith('Not installed: mmdet, mmseg.')
    assert 'pip install onedl-mmdetection==3.5.1 onedl-mmsegmentation==1.4.2' in problem
    problem = the_problem(with_packages(ORIGINAL, mmdet={}))
    assert problem.endswith('pip install mmdet==3.3.0')


def test_an_empty_environment_gets_the_default_stack():
    nothing = Stack(packages={name: {} for name in FORK.packages})
    text = '\n'.join(find_problems(nothing))
    for name, version in stack_module.VERSIONS.items():
        assert (f'{name}=={version}' in text) == name.startswith('onedl-')


def test_mixture_of_distributions():
    problem = the_problem(with_packages(ORIGINAL, mmcv={'onedl-mmcv': '2.3.6'}))
    assert problem.startswith('onedl-mmcv and the rest of the stack')
    assert 'pip uninstall -y onedl-mmcv\n' in problem
    assert problem.endswith('pip install mmcv==2.1.0')


def test_mmcv_outside_the_accepted_range():
    problem = the_problem(with_packages(ORIGINAL, mmcv={'mmcv': '2.2.0'}))
    assert problem.startswith('mmcv 2.2.0 is not accepted by mmdet (>=2.0.0, <2.2.0)')
    assert 'mmsegmentation' in problem
    assert 'mmpretrain' not in problem
    assert problem.endswith('pip install --no-deps mmcv==2.1.0')
    assert find_problems(with_packages(ORIGINAL, mmcv={'mmcv': '2.0.0rc4'})) == []


def test_ranges_are_those_that_the_packages_check():
    mmpretrain = pytest.importorskip('mmpretrain')
    limits = (mmpretrain.mmcv_minimum_version, mmpretrain.mmcv_maximum_version)
    (name,) = collect_stack().packages['mmpretrain']
    assert stack_module.MMCV_RANGES[name] == limits


@pytest.mark.parametrize(
    'torch, torchvision, fits',
    [
        ('2.1.2', '0.16.2', True),
        ('2.4.1+cu121', '0.19.1+cu121', True),
        ('2.11.0+cpu', '0.26.0+cpu', True),
        ('2.11.0', '0.25.0', False),
        ('2.1.2', '0.17.0', False),
    ],
)
def test_torchvision_goes_with_torch(torch, torchvision, fits):
    good = FORK if torch.startswith('2.11') else ORIGINAL
    problems = find_problems(with_versions(good, torch=torch, torchvision=torchvision))
    assert (problems == []) == fits
    for problem in problems:
        assert f'torchvision {torchvision} does not go with PyTorch {torch}' in problem


@pytest.mark.parametrize('torch, fits', [('2.15.0', True), ('2.13.1', False)])
def test_torchvision_may_go_with_newer_torch(torch, fits):
    versions = with_versions(FORK, torch=torch, torchvision='0.29.2')
    assert len(find_problems(versions)) == 1
    problems = find_problems(replace(versions, oldest_torch='2.14.0'))
    assert (problems == []) == fits
    for problem in problems:
        assert 'torchvision 0.29.2 needs PyTorch 2.14.0 or newer.' in problem


@pytest.mark.parametrize(
    'requirement, oldest',
    [
        ('torch>=2.14.0', '2.14.0'),
        ('torch (>=2.14.0)', '2.14.0'),
        ('torch==2.11.0', None),
        ('torch-xla>=2.0', None),
    ],
)
def test_what_torchvision_requires(monkeypatch, requirement, oldest):
    found = ['numpy', requirement]
    monkeypatch.setattr(metadata, 'requires', lambda name: found)
    assert collect_stack().oldest_torch == oldest


def test_torchvision_that_does_not_import():
    error = {'torchvision': 'operator torchvision::nms does not exist'}
    problem = the_problem(with_versions(FORK, error, torchvision=None))
    assert 'operator torchvision::nms does not exist' in problem
    assert 'pip install torch==2.11.0 "torchvision==0.26.*"' in problem


def test_torch_too_old():
    problem = the_problem(with_versions(ORIGINAL, torch='2.0.1', torchvision='0.15.2'))
    assert 'PyTorch 2.0.1 is older than 2.1' in problem
    assert 'pip install torch' in problem


def test_torch_missing():
    error = {'torch': "No module named 'torch'", 'torchvision': 'the same'}
    broken = with_versions(FORK, error, torch=None, torchvision=None)
    assert "No module named 'torch'" in the_problem(broken)


@pytest.mark.parametrize(
    'torch, torchvision, works', [('2.2.2', '0.17.2', False), ('2.3.0', '0.18.0', True)]
)
def test_numpy_2_needs_torch_2_3(torch, torchvision, works):
    stack = with_versions(FORK, torch=torch, torchvision=torchvision)
    assert (find_problems(stack) == []) == works
    if not works:
        assert 'pip install "numpy<2"' in the_problem(stack)


def test_opencv_that_does_not_import():
    error = {'cv2': 'libGL.so.1: cannot open shared object file'}
    problem = the_problem(with_versions(FORK, error, cv2=None))
    assert 'libGL.so.1' in problem
    assert problem.endswith('pip install opencv-python-headless')


def test_pkg_resources_matters_to_the_original_mmengine_alone():
    assert find_problems(replace(FORK, has_pkg_resources=False)) == []
    problem = the_problem(replace(ORIGINAL, has_pkg_resources=False))
    assert problem.endswith('pip install "setuptools<70"')


def test_collect_stack_describes_this_environment():
    import torch
    import torchvision

    found = collect_stack()
    assert found.versions['torch'] == torch.__version__
    assert found.versions['torchvision'] == torchvision.__version__
    names = {d.metadata['Name'] for d in metadata.distributions()}
    for package, candidates in FORK.packages.items():
        expected = names & {*candidates, *ORIGINAL.packages[package]}
        assert set(found.packages[package]) - {'mmcv-lite'} == expected


def test_compiled_mmcv_commands_name_the_installed_distribution():
    fork = 'onedl-mmcv' in collect_stack().packages['mmcv']
    name = 'onedl-mmcv' if fork else 'mmcv'
    commands = stack_module.compiled_mmcv_commands()
    assert f'--no-binary {name} {name}=={metadata.version(name)}\n' in commands
    assert ('"setuptools>=80"' in commands) == fork


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Put the record of a distribution before those that are installed."""
    monkeypatch.syspath_prepend(tmp_path)

    def record(name, version, *requirements):
        folder = tmp_path / f'{name.replace("-", "_")}-{version}.dist-info'
        folder.mkdir()
        lines = ['Metadata-Version: 2.1', f'Name: {name}', f'Version: {version}']
        lines += [f'Requires-Dist: {text}' for text in requirements]
        (folder / 'METADATA').write_text('\n'.join(lines))

    return record


def test_this_environment_has_what_its_packages_require():
    names = {unmet.name for unmet in collect_stack().unmet if not unmet.installed}
    assert names <= stack_module._KNOWN_BY_IMPORT


def test_requirements_that_are_not_met(recorded):
    ((mmdet, version),) = collect_stack().packages['mmdet'].items()
    ((mmengine, _),) = collect_stack().packages['mmengine'].items()
    before = {(unmet.requirement, unmet.user) for unmet in collect_stack().unmet}
    recorded(
        *(mmdet, version, 'Not_There>=1.5', 'helper[fast]', 'numpy', 'torch>=1'),
        *(f'{mmengine}<0.1', 'neither; python_version < "3"', 'nor; extra == "all"'),
        'no requirement at all',
    )
    recorded(
        *('helper', '1.0', 'below ~= 2.0', 'quick; extra == "fast"'),
        'slow; extra == "slow"',
    )
    recorded('below', '1.0', mmdet)
    found = collect_stack().unmet
    installed = metadata.version(mmengine)
    assert [u for u in found if (u.requirement, u.user) not in before] == [
        Unmet('Not_There>=1.5', mmdet),
        Unmet(f'{mmengine}<0.1', mmdet, installed),
        Unmet('below~=2.0', 'helper', '1.0'),
        Unmet('quick', 'helper'),
    ]


@pytest.mark.parametrize('stack', [FORK, ORIGINAL])
def test_what_nobody_declares_is_required(monkeypatch, stack):
    gone = {'ftfy', 'regex', 'matplotlib'}
    left = [d for d in metadata.distributions() if d.metadata['Name'] not in gone]
    monkeypatch.setattr(metadata, 'distributions', lambda: left)
    # mmsegmentation needs the first two; the fork's says so itself.
    expected = gone if stack is ORIGINAL else {'matplotlib'}
    unmet = stack_module._unmet_requirements(stack)
    names = {u.name for u in unmet if u.user == 'mlla_mm' and not u.installed}
    assert names == expected


def test_missing_requirements_are_installed_at_once():
    unmet = [Unmet('shapely', 'mmdet'), Unmet('Not_There>=1', 'mmpretrain')]
    problem = the_problem(replace(FORK, unmet=[*unmet, Unmet('shapely', 'helper')]))
    assert problem.startswith('Not installed: shapely (for mmdet), not-there (for mmp')
    assert problem.endswith('\n  pip install shapely "Not_There>=1"')


@pytest.mark.parametrize('name', ['opencv-python-headless', 'numpy', 'torch', 'mmcv'])
def test_requirements_that_others_bring_or_other_problems_name(name):
    assert find_problems(replace(FORK, unmet=[Unmet(name, 'mmdet')])) == []


def test_versions_matter_among_the_packages():
    unmet = Unmet('onedl-mmengine>=0.11', 'onedl-mmcv', '0.10.12')
    problem = the_problem(replace(FORK, unmet=[unmet]))
    assert 'onedl-mmengine 0.10.12 is not accepted by onedl-mmcv' in problem
    assert problem.endswith('\n  pip install onedl-mmengine==0.10.12')


def test_versions_of_others_matter_where_something_does_not_import():
    stack = replace(FORK, unmet=[Unmet('numba<0.6', 'imaug', '0.61')])
    assert find_problems(stack) == []
    failure = ImportFailure('mmdet.apis', 'ImportError: Numba needs …')
    first, second = find_problems(replace(stack, failures=[failure]))
    assert first.endswith('\n  pip install "numba<0.6"')
    assert second == 'mmdet.apis cannot be imported: ImportError: Numba needs …'


@pytest.mark.parametrize(
    'failure, command',
    [
        (
            ImportFailure('mmseg.apis', 'No module …', 'not_there', ['mmseg']),
            'pip install not_there ',
        ),
        (
            ImportFailure('mmdet.apis', 'No module …', 'yaml', ['mmdet']),
            'pip install --force-reinstall --no-deps --no-cache-dir PyYAML==',
        ),
        (
            ImportFailure('mmdet.apis', 'OSError', None, ['ctypes', 'scipy', 'mmdet']),
            'pip install --force-reinstall --no-deps --no-cache-dir scipy==',
        ),
    ],
)
def test_command_for_what_does_not_import(failure, command):
    assert f'\n  {command}' in the_problem(replace(FORK, failures=[failure]))


def test_one_reason_is_one_problem():
    names = ('mmdet.apis', 'mmseg.apis')
    failures = [ImportFailure(name, 'ValueError: old') for name in names]
    problem = the_problem(replace(FORK, failures=failures))
    assert problem.startswith('mmdet.apis, mmseg.apis cannot be imported: ValueError')


def test_imports_that_fail_for_another_problem_are_not_repeated():
    def failure(name):
        return ImportFailure('mmdet.apis', f'No module named {name!r}', name)

    without_cv2 = with_versions(FORK, {'cv2': 'libGL.so.1:\n not found'}, cv2=None)
    explained = [
        replace(with_packages(FORK, mmdet={}), failures=[failure('mmdet')]),
        replace(FORK, unmet=[Unmet('Shape_ly', 'x')], failures=[failure('shape_ly')]),
        replace(ORIGINAL, has_pkg_resources=False, failures=[failure('pkg_resources')]),
        replace(
            without_cv2,
            failures=[ImportFailure('mmcv.ops', 'ImportError: libGL.so.1: not found')],
        ),
    ]
    for stack in explained:
        assert 'cannot be imported' not in the_problem(stack)

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from dataclasses import replace
from importlib import metadata

import pytest

from mlla_mm.utils import stack as stack_module
from mlla_mm.utils.stack import Stack, collect_stack, find_problems

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

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The pins: what is written elsewhere is the same, and the extras can be read."""

import re
import runpy

import pytest
from packaging.requirements import Requirement

from mlla_mm.compat import versions

from ..processes import ROOT

TEXTS = [
    *ROOT.glob('*.md'),
    *ROOT.glob('configs/**/*.md'),
    *ROOT.glob('docs/**/*.md'),
    *ROOT.glob('benchmarks/**/*.md'),
    *ROOT.glob('benchmarks/**/*.sh'),
    *ROOT.glob('demo/*'),
    *ROOT.glob('tools/**/*.py'),
    *ROOT.glob('tools/**/*.sh'),
    *(path for path in ROOT.glob('.github/**/*') if path.is_file()),
]
ALLOWED = {
    'torch': {v[0] for v in (versions.TORCH, versions.TORCH_ORIGINAL)},
    'torchvision': {v[1] for v in (versions.TORCH, versions.TORCH_ORIGINAL)},
    **{name: {v} for name, v in versions.FORK.values()},
    **{name: {v} for name, v in versions.ORIGINAL.values()},
}


def pins(text):
    names = '|'.join(map(re.escape, ALLOWED))
    return re.findall(rf'(?<![\w-])({names})==(\d[\w.]*\w)', text)


def test_texts_name_the_pinned_versions():
    found = []
    for path in TEXTS:
        # Of the past, the change log may name others.
        if path.suffix in ('.png', '.jpg') or path.name == 'CHANGELOG.md':
            continue
        for name, version in pins(path.read_text()):
            assert version in ALLOWED[name], f'{path}: {name}=={version}'
            found.append(name)
    assert {'onedl-mmcv', 'mmcv'} <= set(found)


def test_installation_page_names_what_the_extras_bring():
    page = (ROOT / 'docs' / 'installation.md').read_text()
    for pair in (versions.TORCH, versions.TORCH_PYTHON39, versions.TORCH_ORIGINAL):
        assert pair[0] in page
    for package in ('mmengine', 'mmcv'):
        assert f'{package} {versions.ORIGINAL[package][1]}' in page
    assert f"echo '{versions.ORIGINAL_SETUPTOOLS}' > constraints.txt" in page
    assert f'PyTorch from {versions.OLDEST_TORCH} on' in page


@pytest.mark.parametrize('extra', versions.EXTRAS)
def test_extras_are_requirements(extra):
    """Each names a distribution once for a Python."""
    names = []
    for line in versions.EXTRAS[extra]:
        requirement = Requirement(line)
        for python in ('3.9', '3.12'):
            marker = requirement.marker
            if marker is None or marker.evaluate({'python_version': python}):
                names.append((python, requirement.name))
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    'pair', [versions.TORCH, versions.TORCH_PYTHON39, versions.TORCH_ORIGINAL]
)
def test_torchvision_goes_with_torch(pair):
    (major, minor), (zero, vision) = (map(int, v.split('.')[:2]) for v in pair)
    assert (major, zero, vision) == (2, 0, 15 + minor)


def test_the_file_needs_no_package():
    """As setup.py executes it, by another interpreter maybe."""
    path = ROOT / 'mlla_mm' / 'compat' / 'versions.py'
    assert not re.findall(r'^\s*(?:import|from) ', path.read_text(), re.M)
    assert runpy.run_path(str(path))['EXTRAS'] == versions.EXTRAS

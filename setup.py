# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements(name):
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


def version():
    scope = {}
    exec((ROOT / 'mlla_mm' / 'version.py').read_text(), scope)
    return scope['__version__']


setup(
    name='mlla_mm',
    version=version(),
    description='MLLA (Mamba-Like Linear Attention) for OpenMMLab: detection, '
    'segmentation and classification',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.9',
    packages=find_packages(include=['mlla_mm', 'mlla_mm.*']),
    # mmengine, mmcv and the rest come from one of two sets of distributions with the
    # same import names, so neither is required here: choose an extra.
    install_requires=requirements('runtime'),
    extras_require={
        name: requirements(name) for name in ('onedl', 'openmmlab', 'tests', 'docs')
    },
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)

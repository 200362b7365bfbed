# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Every version that is pinned, and the extras of the package.

Imports nothing: setup.py and tools/misc/install_packages.py execute this file where
nothing is installed yet.
"""

OLDEST_TORCH = '2.1'

#: PyTorch and torchvision: the tested pair, the pair for Python 3.9, and the pair that
#: is tested with the original packages. Every pair from OLDEST_TORCH on works.
TORCH = ('2.11.0', '0.26.0')
TORCH_PYTHON39 = ('2.8.0', '0.23.0')
TORCH_ORIGINAL = ('2.1.2', '0.16.2')

#: Distribution and version of each OpenMMLab package, by import name: the maintained
#: fork and the original packages.
FORK = {
    'mmengine': ('onedl-mmengine', '0.10.12'),
    'mmcv': ('onedl-mmcv', '2.3.6'),
    'mmdet': ('onedl-mmdetection', '3.5.1'),
    'mmseg': ('onedl-mmsegmentation', '1.4.2'),
    'mmpretrain': ('onedl-mmpretrain', '1.3.6'),
}
ORIGINAL = {
    'mmengine': ('mmengine', '0.10.7'),
    'mmcv': ('mmcv', '2.1.0'),
    'mmdet': ('mmdet', '3.3.0'),
    'mmseg': ('mmsegmentation', '1.2.2'),
    'mmpretrain': ('mmpretrain', '1.2.0'),
}

#: The newest OpenCV that the fork's imaug takes. Older releases of imaug have no bound,
#: and bring OpenCV 5.
FORK_OPENCV = 'opencv-python<4.13'
#: OpenCV 4.12 requires it. Without this line some installers take a newer NumPy and an
#: older OpenCV.
FORK_NUMPY = 'numpy<2.3'
#: Compiles the ops of the fork's mmcv.
FORK_SETUPTOOLS = 'setuptools>=80'

#: The original packages and PyTorch 2.1 need NumPy 1. OpenCV 4.12 needs NumPy 2.
ORIGINAL_NUMPY = 'numpy<2'
ORIGINAL_OPENCV = 'opencv-python<4.12'
#: mmengine imports pkg_resources, and mmcv does not build without it. Newer versions of
#: setuptools do not have it.
ORIGINAL_SETUPTOOLS = 'setuptools<70'

RUNTIME = ['matplotlib', 'scikit-learn']
EXTRAS = {
    # PyTorch for new environments.
    'torch': [
        f'torch=={TORCH[0]}; python_version >= "3.10"',
        f'torchvision=={TORCH[1]}; python_version >= "3.10"',
        f'torch=={TORCH_PYTHON39[0]}; python_version < "3.10"',
        f'torchvision=={TORCH_PYTHON39[1]}; python_version < "3.10"',
        FORK_NUMPY,
    ],
    'torch21': [
        f'torch=={TORCH_ORIGINAL[0]}',
        f'torchvision=={TORCH_ORIGINAL[1]}',
        ORIGINAL_NUMPY,
    ],
    # One of the two: they have the same import names.
    'onedl': [
        *[f'{name}=={version}' for name, version in FORK.values()],
        FORK_OPENCV,
    ],
    'openmmlab': [
        *[f'{name}=={version}' for name, version in ORIGINAL.values()],
        ORIGINAL_NUMPY,
        ORIGINAL_OPENCV,
        ORIGINAL_SETUPTOOLS,
        # mmsegmentation imports them and does not require them.
        'ftfy',
        'regex',
    ],
    # Other versions of ruff format code differently; mypy's find other errors.
    'tests': [
        'pytest',
        'pytest-xdist',
        'hypothesis',
        'ruff==0.17.6',
        'mypy==2.4.1; python_version >= "3.10"',
    ],
    'docs': [
        'sphinx',
        'myst-parser',
        'furo',
        'sphinx-copybutton',
        # For demo/mlla_mm_demo.ipynb, as a notebook and in its test.
        'nbclient',
        'ipykernel',
    ],
    # For tools/export.py --format onnx. They need NumPy 2, so they do not go with
    # `openmmlab`.
    'export': ['onnx', 'onnxruntime'],
}

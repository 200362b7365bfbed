# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Every version that is pinned, and the extras of the package.

Imports nothing: setup.py and tools/misc/install_packages.py execute this file where
nothing is installed yet.
"""

OLDEST_TORCH = '2.1'

#: PyTorch and torchvision: what is tested, its like for Python 3.9, and what is tested
#: with the original packages. Any pair from OLDEST_TORCH on works.
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
#: What OpenCV 4.12 wants. Without it, installers differ: some take a newer NumPy and an
#: older OpenCV.
FORK_NUMPY = 'numpy<2.3'
#: What compiles its mmcv's ops.
FORK_SETUPTOOLS = 'setuptools>=80'

#: The original packages and their PyTorch are of NumPy 1's time; OpenCV 4.12 is not.
ORIGINAL_NUMPY = 'numpy<2'
ORIGINAL_OPENCV = 'opencv-python<4.12'
#: mmengine imports pkg_resources, and mmcv does not build without.
ORIGINAL_SETUPTOOLS = 'setuptools<70'

RUNTIME = ['matplotlib', 'scikit-learn']
EXTRAS = {
    # For new environments.
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
        # mmsegmentation needs them and does not say so.
        'ftfy',
        'regex',
    ],
    # Another ruff lays out code in another way, and another mypy finds other errors.
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
    # For tools/export.py --format onnx. They bring NumPy 2: not beside `openmmlab`.
    'export': ['onnx', 'onnxruntime', 'onnxscript'],
}

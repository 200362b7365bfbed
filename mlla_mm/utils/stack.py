# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Which OpenMMLab distribution is installed, and what is wrong with it.

The same import names (``mmengine``, ``mmcv``, ``mmdet``, ``mmseg``, ``mmpretrain``)
come from two sets of distributions, OpenMMLab's own and the maintained onedl fork.
Nothing but the standard library is imported at the top, so that a broken stack can be
examined.
"""

import importlib
import importlib.util
import platform
import re
from dataclasses import dataclass, field
from importlib import metadata
from typing import Optional

FORK = 'onedl'
ORIGINAL = 'openmmlab'

#: Distributions of each import name, first the one to install, and its version.
DISTRIBUTIONS = {
    FORK: {
        'mmengine': ('onedl-mmengine',),
        'mmcv': ('onedl-mmcv',),
        'mmdet': ('onedl-mmdetection',),
        'mmseg': ('onedl-mmsegmentation',),
        'mmpretrain': ('onedl-mmpretrain',),
    },
    ORIGINAL: {
        'mmengine': ('mmengine',),
        'mmcv': ('mmcv', 'mmcv-lite'),
        'mmdet': ('mmdet',),
        'mmseg': ('mmsegmentation',),
        'mmpretrain': ('mmpretrain',),
    },
}
VERSIONS = {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.4.2',
    'onedl-mmpretrain': '1.3.6',
    'mmengine': '0.10.7',
    'mmcv': '2.1.0',
    'mmdet': '3.3.0',
    'mmsegmentation': '1.2.2',
    'mmpretrain': '1.2.0',
}
PACKAGES = tuple(DISTRIBUTIONS[FORK])

#: mmcv versions (from, to before) that these distributions check on import.
MMCV_RANGES = {
    'mmdet': ('2.0.0', '2.2.0'),
    'mmsegmentation': ('2.0.0', '2.2.0'),
    'mmpretrain': ('2.0.0', '2.4.0'),
    'onedl-mmpretrain': ('2.0.0', '2.4.0'),
}
MIN_TORCH = '2.1'


@dataclass
class Stack:
    """What is installed.

    Args:
        packages (dict[str, dict[str, str]]): Version of every installed distribution,
            by import name and distribution name.
        versions (dict[str, str]): Versions of the libraries below, without those that
            are not installed: ``torch``, ``torchvision``, ``numpy``, ``cv2``.
        import_errors (dict[str, str]): Why ``torch``, ``torchvision`` or ``cv2`` does
            not import, by import name.
        has_pkg_resources (bool): Whether setuptools brings ``pkg_resources``.
            Defaults to True.
        oldest_torch (str, optional): Oldest PyTorch that the installed torchvision goes
            with, if it goes with newer ones too. Defaults to None: it goes with one.
    """

    packages: dict[str, dict[str, str]]
    versions: dict[str, str] = field(default_factory=dict)
    import_errors: dict[str, str] = field(default_factory=dict)
    has_pkg_resources: bool = True
    oldest_torch: Optional[str] = None

    @property
    def distribution(self) -> str:
        """str: The set that most packages come from: 'onedl' or 'openmmlab'."""
        names = [name for found in self.packages.values() for name in found]
        fork = sum(name.startswith('onedl-') for name in names)
        return FORK if 2 * fork >= len(names) else ORIGINAL


def collect_stack() -> Stack:
    """Look at the running environment.

    Returns:
        Stack: What is installed.
    """
    versions, import_errors = {}, {}
    for name in ('torch', 'torchvision', 'numpy', 'cv2'):
        try:
            versions[name] = _import_version(name)
        # Mismatched binaries fail with RuntimeError, OSError, AttributeError too.
        except Exception as error:
            import_errors[name] = str(error)
    return Stack(
        packages={name: _installed(name) for name in PACKAGES},
        versions=versions,
        import_errors=import_errors,
        has_pkg_resources=importlib.util.find_spec('pkg_resources') is not None,
        oldest_torch=_oldest_torch(),
    )


def find_problems(stack: Stack) -> list[str]:
    """List what is wrong with a stack.

    Args:
        stack (Stack): As from :func:`collect_stack`.

    Returns:
        list[str]: One text per problem: what is wrong, and the commands that mend it.
        Empty where all is well.
    """
    return [
        *_torch_problems(stack),
        *_torchvision_problems(stack),
        *_numpy_problems(stack),
        *_opencv_problems(stack),
        *_distribution_problems(stack),
        *_mmcv_range_problems(stack),
        *_pkg_resources_problems(stack),
    ]


def compiled_mmcv_commands() -> str:
    """Say how to get mmcv with compiled ops, for the distribution in use.

    Returns:
        str: Commands, one per line, indented.
    """
    stack = Stack(packages={name: _installed(name) for name in PACKAGES})
    fork = stack.distribution == FORK
    name = 'onedl-mmcv' if fork else 'mmcv'
    found = _installed('mmcv')
    version = found.get(name) or VERSIONS[name]
    # Without --no-build-isolation the build does not see PyTorch and leaves the ops
    # out; without --no-cache-dir pip takes the wheel without ops that it built before.
    return '\n'.join(
        [
            *([f'  pip uninstall -y {" ".join(found)}'] if found else []),
            f'  pip install "setuptools{">=80" if fork else "<70"}" wheel ninja',
            '  MMCV_WITH_OPS=1 pip install --no-build-isolation --no-deps '
            f'--no-cache-dir --no-binary {name} {name}=={version}',
            '  (takes some 15 minutes and a C++ compiler; for GPU ops also the '
            'nvcc of the CUDA version of PyTorch, and FORCE_CUDA=1 where no GPU is '
            'visible)',
        ]
    )


def _import_version(name: str) -> str:
    """Import a library, torchvision with its compiled operators."""
    version = importlib.import_module(name).__version__
    if name == 'torchvision':
        importlib.import_module('torch').ops.torchvision.nms  # noqa: B018
    return version


def _oldest_torch() -> Optional[str]:
    """Lower bound of the installed torchvision's requirement, unless it is exact."""
    try:
        requirements = metadata.requires('torchvision') or []
    except metadata.PackageNotFoundError:
        return None
    for requirement in requirements:
        found = re.match(r'torch *\(?>= *([\d.]+)', requirement)
        if found:
            return found[1]
    return None


def _installed(package: str) -> dict[str, str]:
    """Installed distributions of an import name and their versions."""
    found = {}
    for names in DISTRIBUTIONS.values():
        for name in names[package]:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
    return found


def _release(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: '2.11.0+cu130' gives (2, 11, 0)."""
    return tuple(int(part) for part in re.match(r'\d+(\.\d+)*', version)[0].split('.'))


def _requirement(stack: Stack, package: str) -> str:
    """What to ``pip install`` for an import name, in the distribution in use."""
    name = DISTRIBUTIONS[stack.distribution][package][0]
    return f'{name}=={VERSIONS[name]}'


def _torchvision_for(torch_version: str) -> Optional[str]:
    """Minor series of torchvision that goes with a PyTorch 2.x."""
    major, minor = _release(torch_version)[:2]
    return f'0.{15 + minor}' if major == 2 else None


def _torch_problems(stack: Stack) -> list[str]:
    if 'torch' not in stack.versions:
        return [
            f'PyTorch does not import: {stack.import_errors.get("torch")}\n'
            '  pip install torch==2.11.0 torchvision==0.26.0'
        ]
    version = stack.versions['torch']
    if _release(version) < _release(MIN_TORCH):
        return [
            f'PyTorch {version} is older than {MIN_TORCH}, the oldest that is '
            'supported.\n'
            '  pip install torch==2.1.2 torchvision==0.16.2   # or newer'
        ]
    return []


def _torchvision_problems(stack: Stack) -> list[str]:
    torch_version = stack.versions.get('torch')
    if torch_version is None:
        return []
    expected = _torchvision_for(torch_version)
    version = stack.versions.get('torchvision')
    if version is None:
        what = f'torchvision does not import: {stack.import_errors.get("torchvision")}'
    elif stack.oldest_torch:
        if _release(torch_version) >= _release(stack.oldest_torch):
            return []
        what = f'torchvision {version} needs PyTorch {stack.oldest_torch} or newer.'
    elif expected and _release(version)[:2] != _release(expected):
        what = f'torchvision {version} does not go with PyTorch {torch_version}.'
    else:
        return []
    pin = f'=={expected}.*' if expected else ''
    release = torch_version.split('+')[0]
    return [f'{what}\n  pip install torch=={release} "torchvision{pin}"']


def _numpy_problems(stack: Stack) -> list[str]:
    numpy, torch = stack.versions.get('numpy'), stack.versions.get('torch')
    if numpy is None:
        return [
            f'NumPy does not import: {stack.import_errors.get("numpy")}\n'
            '  pip install numpy'
        ]
    if torch and _release(numpy) >= (2,) and _release(torch) < (2, 3):
        return [
            f'NumPy {numpy} does not work with PyTorch {torch}, which was built for '
            'NumPy 1.\n  pip install "numpy<2" "opencv-python<4.12"'
        ]
    return []


def _opencv_problems(stack: Stack) -> list[str]:
    if 'cv2' in stack.versions:
        return []
    error = stack.import_errors.get('cv2')
    # The headless build does without the libGL that servers and containers lack.
    return [
        f'OpenCV does not import: {error}\n'
        '  pip uninstall -y opencv-python opencv-python-headless\n'
        '  pip install opencv-python-headless'
    ]


def _distribution_problems(stack: Stack) -> list[str]:
    problems = []
    missing = []
    for package, found in stack.packages.items():
        if not found:
            missing.append(package)
        elif len(found) > 1:
            names = ' and '.join(found)
            problems.append(
                f'{names} are installed on top of each other: both bring the package '
                f'{package}, and its files are a mixture.\n'
                f'  pip uninstall -y {" ".join(found)}\n'
                f'  pip install --no-deps {_requirement(stack, package)}'
            )
    if missing:
        problems.append(
            f'Not installed: {", ".join(missing)}.\n  pip install '
            + ' '.join(_requirement(stack, package) for package in missing)
        )
    return problems + _mixture_problems(stack)


def _mixture_problems(stack: Stack) -> list[str]:
    """Packages of one set beside those of the other."""
    wanted = DISTRIBUTIONS[stack.distribution]
    strangers = {
        package: name
        for package, found in stack.packages.items()
        for name in found
        if len(found) == 1 and name not in wanted[package]
    }
    if not strangers:
        return []
    return [
        f'{", ".join(strangers.values())} and the rest of the stack come from two '
        'different sets of distributions, which do not accept each other.\n'
        f'  pip uninstall -y {" ".join(strangers.values())}\n'
        f'  pip install '
        + ' '.join(_requirement(stack, package) for package in strangers)
    ]


def _mmcv_range_problems(stack: Stack) -> list[str]:
    mmcv = stack.packages.get('mmcv', {})
    # What sets a mixture right decides the version of mmcv as well.
    if len(mmcv) != 1 or _mixture_problems(stack):
        return []
    ((name, version),) = mmcv.items()
    installed = {n for found in stack.packages.values() for n in found}
    refusing = [
        f'{user} (>={low}, <{high})'
        for user, (low, high) in MMCV_RANGES.items()
        if user in installed and not _release(low) <= _release(version) < _release(high)
    ]
    if not refusing:
        return []
    return [
        f'{name} {version} is not accepted by {", ".join(refusing)}.\n'
        f'  pip uninstall -y {name}\n'
        f'  pip install --no-deps {_requirement(stack, "mmcv")}'
    ]


def _pkg_resources_problems(stack: Stack) -> list[str]:
    if stack.has_pkg_resources or 'mmengine' not in stack.packages.get('mmengine', {}):
        return []
    return [
        'mmengine imports pkg_resources, which the installed setuptools no longer has '
        f'(Python {platform.python_version()}).\n  pip install "setuptools<70"'
    ]

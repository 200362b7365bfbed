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
from collections import deque
from dataclasses import dataclass, field
from importlib import metadata
from typing import Optional

from . import versions as pins
from .imports import ImportFailure, one_line

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
VERSIONS = dict([*pins.FORK.values(), *pins.ORIGINAL.values()])
PACKAGES = tuple(DISTRIBUTIONS[FORK])

#: mmcv versions (from, to before) that these distributions check on import.
MMCV_RANGES = {
    'mmdet': ('2.0.0', '2.2.0'),
    'mmsegmentation': ('2.0.0', '2.2.0'),
    'mmpretrain': ('2.0.0', '2.4.0'),
    'onedl-mmpretrain': ('2.0.0', '2.4.0'),
}

#: Missing, these are known by what does not import, or brought by others.
_KNOWN_BY_IMPORT = {
    *('numpy', 'setuptools', 'torch', 'torchvision'),
    *('opencv-python', 'opencv-python-headless'),
}


@dataclass
class Unmet:
    """A requirement that the environment does not meet.

    Args:
        requirement (str): As pip takes it, such as ``'scipy>=1.10'``.
        user (str): The distribution that requires it.
        installed (str, optional): The version that is installed in place of it.
            Defaults to None.
    """

    requirement: str
    user: str
    installed: Optional[str] = None

    @property
    def name(self) -> str:
        """str: The distribution that is required, in pip's spelling."""
        return _spelling(re.match(r'[\w.-]+', self.requirement)[0])


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
        unmet (list[Unmet]): Requirements of the installed packages, and of what these
            require, that are not met. Defaults to an empty list.
        failures (list[ImportFailure]): What does not import of what runs import. Not
            looked for by :func:`collect_stack`. Defaults to an empty list.
    """

    packages: dict[str, dict[str, str]]
    versions: dict[str, str] = field(default_factory=dict)
    import_errors: dict[str, str] = field(default_factory=dict)
    has_pkg_resources: bool = True
    oldest_torch: Optional[str] = None
    unmet: list[Unmet] = field(default_factory=list)
    failures: list[ImportFailure] = field(default_factory=list)

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
    stack = Stack(
        packages={name: _installed(name) for name in PACKAGES},
        versions=versions,
        import_errors=import_errors,
        has_pkg_resources=importlib.util.find_spec('pkg_resources') is not None,
        oldest_torch=_oldest_torch(),
    )
    stack.unmet = _unmet_requirements(stack)
    return stack


def find_problems(stack: Stack) -> list[str]:
    """List what is wrong with a stack.

    Args:
        stack (Stack): As from :func:`collect_stack`.

    Returns:
        list[str]: One text per problem: what is wrong, and the commands that mend it.
        Empty where all is well.
    """
    problems = [
        *_torch_problems(stack),
        *_torchvision_problems(stack),
        *_numpy_problems(stack),
        *_opencv_problems(stack),
        *_distribution_problems(stack),
        *_mmcv_range_problems(stack),
        *_pkg_resources_problems(stack),
        *_requirement_problems(stack),
    ]
    return problems + _import_problems(stack, mend=not problems)


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
    setuptools = pins.FORK_SETUPTOOLS if fork else pins.ORIGINAL_SETUPTOOLS
    # Without --no-build-isolation the build does not see PyTorch and leaves the ops
    # out; without --no-cache-dir pip takes the wheel without ops that it built before.
    return '\n'.join(
        [
            *([f'  pip uninstall -y {" ".join(found)}'] if found else []),
            f'  pip install "{setuptools}" wheel ninja',
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


def _unmet_requirements(stack: Stack) -> list[Unmet]:
    """Follow what the packages require, and what that requires."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:  # required by all, so their import tells
        return []
    installed = {}
    for distribution in metadata.distributions():
        name = distribution.metadata['Name']
        if name:  # remains of a removed one may have none
            installed.setdefault(_spelling(name), distribution)
    # They write the same files: one of them is enough.
    opencv = ('opencv-python', 'opencv-python-headless')
    for name, other in (opencv, opencv[::-1]):
        if other in installed:
            installed.setdefault(name, installed[other])

    used = [name for found in stack.packages.values() for name in found]
    # The packages, of which there are two sets, are looked at by themselves.
    own = [
        text
        for text in (*pins.RUNTIME, *pins.EXTRAS[stack.distribution])
        if Requirement(text).name not in VERSIONS
    ]
    queue = deque([('mlla_mm', '', own), *((name, '', None) for name in used)])
    seen, found = set(), {}
    while queue:
        user, extra, texts = queue.popleft()
        if (user, extra) in seen:
            continue
        seen.add((user, extra))
        if texts is None:
            texts = installed[user].requires or [] if user in installed else []
        for text in texts:
            try:
                wanted = Requirement(text)
            except InvalidRequirement:  # of times when nobody checked
                continue
            if wanted.marker and not wanted.marker.evaluate({'extra': extra}):
                continue
            name = _spelling(wanted.name)
            plain = f'{wanted.name}{wanted.specifier}'
            version = installed[name].version if name in installed else None
            if not version or not wanted.specifier.contains(version, prereleases=True):
                # Once, though what an extra adds comes with the rest again.
                found[plain, user] = Unmet(plain, user, version)
            queue.extend((name, e, None) for e in ('', *sorted(wanted.extras)))
    return list(found.values())


def _spelling(name: str) -> str:
    """A distribution's name as pip compares it."""
    return re.sub(r'[-_.]+', '-', name).lower()


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


def _pip_install_torch(pair: tuple[str, str]) -> str:
    return f'pip install torch=={pair[0]} torchvision=={pair[1]}'


def _torchvision_for(torch_version: str) -> Optional[str]:
    """Minor series of torchvision that goes with a PyTorch 2.x."""
    major, minor = _release(torch_version)[:2]
    return f'0.{15 + minor}' if major == 2 else None


def _torch_problems(stack: Stack) -> list[str]:
    if 'torch' not in stack.versions:
        return [
            f'PyTorch does not import: {stack.import_errors.get("torch")}\n'
            f'  {_pip_install_torch(pins.TORCH)}'
        ]
    version = stack.versions['torch']
    if _release(version) < _release(pins.OLDEST_TORCH):
        return [
            f'PyTorch {version} is older than {pins.OLDEST_TORCH}, the oldest that is '
            'supported.\n'
            f'  {_pip_install_torch(pins.TORCH_ORIGINAL)}   # or newer'
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
            'NumPy 1.\n  '
            f'pip install "{pins.ORIGINAL_NUMPY}" "{pins.ORIGINAL_OPENCV}"'
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
        f'(Python {platform.python_version()}).\n'
        f'  pip install "{pins.ORIGINAL_SETUPTOOLS}"'
    ]


def _requirement_problems(stack: Stack) -> list[str]:
    missing, unfit = {}, {}
    for unmet in stack.unmet:
        if unmet.installed:
            # Many environments run in spite of versions that someone does not want:
            # they matter among the packages, and where something does not import.
            if unmet.name in VERSIONS or stack.failures:
                unfit.setdefault(unmet.name, unmet)
        elif unmet.name not in _KNOWN_BY_IMPORT and unmet.name not in VERSIONS:
            missing.setdefault(unmet.name, unmet)
    problems = []
    if missing:
        names = ', '.join(f'{m.name} (for {m.user})' for m in missing.values())
        wanted = ' '.join(_quoted(m.requirement) for m in missing.values())
        problems.append(f'Not installed: {names}.\n  pip install {wanted}')
    for unmet in unfit.values():
        pin = VERSIONS.get(unmet.name)
        wanted = f'{unmet.name}=={pin}' if pin else _quoted(unmet.requirement)
        problems.append(
            f'{unmet.name} {unmet.installed} is not accepted by {unmet.user} '
            f'({unmet.requirement}).\n  pip install {wanted}'
        )
    return problems


def _quoted(requirement: str) -> str:
    """A requirement as a word of a shell."""
    return f'"{requirement}"' if re.search('[<>=!~]', requirement) else requirement


def _import_problems(stack: Stack, mend: bool) -> list[str]:
    """What does not import for a reason that no other problem names.

    Args:
        stack (Stack): What is installed.
        mend (bool): Whether to give a command. Where there are other problems they come
            first, and may be the reason.
    """
    named = {
        'pkg-resources',
        *stack.import_errors,
        *(name for name, found in stack.packages.items() if not found),
        *(unmet.name for unmet in stack.unmet if not unmet.installed),
    }
    errors = [one_line(text) for text in stack.import_errors.values()]
    by_error = {}
    for failure in stack.failures:
        is_named = failure.not_found and _spelling(failure.not_found) in named
        if not is_named and not any(e and e in failure.error for e in errors):
            by_error.setdefault(failure.error, []).append(failure)
    return [
        f'{", ".join(f.module for f in failures)} cannot be imported: {error}'
        + (_mending_command(failures[0]) if mend else '')
        for error, failures in by_error.items()
    ]


def _mending_command(failure: ImportFailure) -> str:
    """Install again what is broken, as far as that can be told."""
    distributions = {}
    for distribution in metadata.distributions():
        for file in distribution.files or ():
            distributions.setdefault(file.parts[0].split('.')[0], distribution)
    if failure.not_found and failure.not_found not in distributions:
        return f'\n  pip install {failure.not_found}   # or what has it as a module'
    for package in (failure.not_found, *failure.raised_in):
        if package in distributions:
            broken = distributions[package]
            name = broken.metadata['Name']
            return (
                '\n  pip install --force-reinstall --no-deps --no-cache-dir '
                f'{name}=={broken.version}'
            )
    return ''

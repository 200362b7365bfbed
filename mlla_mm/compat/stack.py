# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Finds out which packages are installed and whether they fit together.

The same import names (``mmengine``, ``mmcv``, ``mmdet``, ``mmseg``, ``mmpretrain``)
come from two sets of distributions: OpenMMLab's own packages and the maintained onedl
fork. This module imports only the standard library at its top, so that it also works
where the installation is broken.
"""

import importlib
import importlib.util
import platform
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Dict, List, Optional, Set, Tuple

from . import versions as pins
from .imports import ImportFailure, one_line

FORK = 'onedl'
ORIGINAL = 'openmmlab'

#: Distribution and pinned version of each import name, in both sets.
PINNED: Dict[str, Dict[str, Tuple[str, str]]] = {
    FORK: pins.FORK,
    ORIGINAL: pins.ORIGINAL,
}
VERSIONS = dict([*pins.FORK.values(), *pins.ORIGINAL.values()])
PACKAGES = tuple(pins.FORK)

#: The mmcv versions (first, first too new) that these distributions accept on import.
MMCV_RANGES = {
    'mmdet': ('2.0.0', '2.2.0'),
    'mmsegmentation': ('2.0.0', '2.2.0'),
    'mmpretrain': ('2.0.0', '2.4.0'),
    'onedl-mmpretrain': ('2.0.0', '2.4.0'),
}

# If one of these is missing, another problem says so, or another package brings it.
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
        installed (str, optional): The installed version, which does not meet it. None
            means that nothing is installed. Defaults to None.
    """

    requirement: str
    user: str
    installed: Optional[str] = None

    @property
    def name(self) -> str:
        """str: The distribution that is required, in pip's spelling."""
        return _spelling(re.split(r'[^\w.-]', self.requirement)[0])


@dataclass
class Stack:
    """What is installed.

    Args:
        packages (dict[str, dict[str, str]]): Versions of the installed distributions,
            by import name and then by distribution name.
        versions (dict[str, str]): Versions of those of the libraries ``torch``,
            ``torchvision``, ``numpy`` and ``cv2`` that import.
        import_errors (dict[str, str]): Errors of those that do not import.
        has_pkg_resources (bool): Whether setuptools contains ``pkg_resources``.
            Defaults to True.
        oldest_torch (str, optional): Oldest PyTorch that the installed torchvision
            works with, if it also works with newer ones. None means that it works with
            a single version. Defaults to None.
        unmet (list[Unmet]): Requirements that are not met, of the packages and of the
            distributions that they require. Defaults to an empty list.
        failures (list[ImportFailure]): Modules that a run imports and that fail.
            :func:`collect_stack` leaves it empty. Defaults to an empty list.
    """

    packages: Dict[str, Dict[str, str]]
    versions: Dict[str, str] = field(default_factory=dict)
    import_errors: Dict[str, str] = field(default_factory=dict)
    has_pkg_resources: bool = True
    oldest_torch: Optional[str] = None
    unmet: List[Unmet] = field(default_factory=list)
    failures: List[ImportFailure] = field(default_factory=list)

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
            versions[name] = importlib.import_module(name).__version__
            if name == 'torchvision':  # its compiled operators load later
                importlib.import_module('torch').ops.torchvision.nms  # noqa: B018
        # Mismatched binaries also fail with RuntimeError, OSError or AttributeError.
        except Exception as error:
            versions.pop(name, None)
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


def find_problems(stack: Stack) -> List[str]:
    """List what is wrong with a stack.

    Args:
        stack (Stack): As from :func:`collect_stack`.

    Returns:
        list[str]: One text for each problem, with the commands that fix it.
    """
    problems = [
        *_library_problems(stack),
        *_distribution_problems(stack),
        *_requirement_problems(stack),
    ]
    # Other problems come first. They may be the reason why something does not import.
    return problems + list(_import_problems(stack, with_command=not problems))


def compiled_mmcv_commands() -> str:
    """Give the commands that install mmcv with compiled ops.

    Returns:
        str: Commands for the set of packages in use, one per line, indented.
    """
    stack = Stack(packages={name: _installed(name) for name in PACKAGES})
    name, pin = PINNED[stack.distribution]['mmcv']
    is_fork = stack.distribution == FORK
    setuptools = pins.FORK_SETUPTOOLS if is_fork else pins.ORIGINAL_SETUPTOOLS
    found = stack.packages['mmcv']
    # Without --no-build-isolation the build does not see PyTorch and leaves the ops
    # out. Without --no-cache-dir pip takes the wheel without ops that it built before.
    return '\n'.join(
        [
            *([f'  pip uninstall -y {" ".join(found)}'] if found else []),
            f'  pip install "{setuptools}" wheel ninja',
            '  MMCV_WITH_OPS=1 pip install --no-build-isolation --no-deps '
            f'--no-cache-dir --no-binary {name} {name}=={found.get(name, pin)}',
            '  (takes about 15 minutes and needs a C++ compiler; GPU ops also need the '
            'nvcc of the CUDA version of PyTorch, and FORCE_CUDA=1 if no GPU is '
            'visible)',
        ]
    )


def _oldest_torch() -> Optional[str]:
    """Lower bound of the installed torchvision's requirement, unless it is exact."""
    try:
        requirements = metadata.requires('torchvision') or []
    except metadata.PackageNotFoundError:
        return None
    found = re.search(r'^torch *\(?>= *([\d.]+)', '\n'.join(requirements), re.M)
    return found[1] if found else None


def _unmet_requirements(stack: Stack) -> List[Unmet]:
    """Follow what the packages require, and what these requirements require."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:  # every package needs it, so importing them shows the problem
        return []
    installed: Dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions():
        # The remains of a removed distribution may have no name.
        installed.setdefault(
            _spelling(distribution.metadata['Name'] or ''), distribution
        )
    # Both write the same files, so one of them is enough.
    opencv = ('opencv-python', 'opencv-python-headless')
    for name, other in (opencv, opencv[::-1]):
        if other in installed:
            installed.setdefault(name, installed[other])

    requirements: Dict[str, List[str]] = {
        # Other checks look at the packages, of which there are two sets.
        'mlla_mm': [
            text
            for text in (*pins.RUNTIME, *pins.EXTRAS[stack.distribution])
            if Requirement(text).name not in VERSIONS
        ]
    }
    queue = deque([('mlla_mm', '')])
    queue.extend((name, '') for found in stack.packages.values() for name in found)
    seen: Set[Tuple[str, str]] = set()
    unmet: Dict[Tuple[str, str], Unmet] = {}
    while queue:
        user, extra = queue.popleft()
        if (user, extra) in seen:
            continue
        seen.add((user, extra))
        if user in installed:
            requirements.setdefault(user, installed[user].requires or [])
        for text in requirements.get(user, []):
            try:
                wanted = Requirement(text)
            except InvalidRequirement:  # old distributions have such texts
                continue
            if wanted.marker and not wanted.marker.evaluate({'extra': extra}):
                continue
            name = _spelling(wanted.name)
            version = installed[name].version if name in installed else None
            if not version or not wanted.specifier.contains(version, prereleases=True):
                plain = f'{wanted.name}{wanted.specifier}'
                unmet[plain, user] = Unmet(plain, user, version)
            queue.extend((name, e) for e in ('', *sorted(wanted.extras)))
    return list(unmet.values())


def _spelling(name: str) -> str:
    """The name of a distribution as pip compares it."""
    return re.sub(r'[-_.]+', '-', name).lower()


def _installed(package: str) -> Dict[str, str]:
    """Versions of the installed distributions of an import name."""
    names = [pinned[package][0] for pinned in PINNED.values()]
    if package == 'mmcv':
        names.append('mmcv-lite')
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _release(version: str) -> Tuple[int, ...]:
    """Leading numbers of a version: '2.11.0+cu130' gives (2, 11, 0)."""
    return tuple(map(int, re.findall(r'\d+', re.split(r'[^\d.]', version)[0])))


def _requirement(stack: Stack, *packages: str) -> str:
    """What to ``pip install`` for import names, in the set in use."""
    return ' '.join('=='.join(PINNED[stack.distribution][name]) for name in packages)


def _library_problems(stack: Stack) -> Iterator[str]:
    """Problems of PyTorch, torchvision, NumPy and OpenCV."""
    errors = stack.import_errors
    torch, torchvision, numpy, cv2 = map(
        stack.versions.get, ('torch', 'torchvision', 'numpy', 'cv2')
    )
    install = 'pip install torch=={} torchvision=={}'
    if torch is None:
        yield (
            f'PyTorch does not import: {errors.get("torch")}\n'
            f'  {install.format(*pins.TORCH)}'
        )
    elif _release(torch) < _release(pins.OLDEST_TORCH):
        yield (
            f'PyTorch {torch} is older than {pins.OLDEST_TORCH}, the oldest that is '
            f'supported.\n  {install.format(*pins.TORCH_ORIGINAL)}   # or newer'
        )
    if torch is not None:
        yield from _torchvision_problems(stack, torch, torchvision)
    if numpy is None:
        yield f'NumPy does not import: {errors.get("numpy")}\n  pip install numpy'
    elif torch and _release(numpy) >= (2,) and _release(torch) < (2, 3):
        yield (
            f'NumPy {numpy} does not work with PyTorch {torch}, which was built for '
            'NumPy 1.\n  '
            f'pip install "{pins.ORIGINAL_NUMPY}" "{pins.ORIGINAL_OPENCV}"'
        )
    if cv2 is None:
        # The headless build does not need libGL, which servers and containers lack.
        yield (
            f'OpenCV does not import: {errors.get("cv2")}\n'
            '  pip uninstall -y opencv-python opencv-python-headless\n'
            '  pip install opencv-python-headless'
        )


def _torchvision_problems(
    stack: Stack, torch: str, torchvision: Optional[str]
) -> Iterator[str]:
    major, minor = _release(torch)[:2]
    expected = f'0.{15 + minor}' if major == 2 else None
    what = None
    if torchvision is None:
        what = f'torchvision does not import: {stack.import_errors.get("torchvision")}'
    elif stack.oldest_torch:
        if _release(torch) < _release(stack.oldest_torch):
            needed = f'PyTorch {stack.oldest_torch} or newer'
            what = f'torchvision {torchvision} needs {needed}.'
    elif expected and _release(torchvision)[:2] != _release(expected):
        what = f'torchvision {torchvision} does not go with PyTorch {torch}.'
    if what:
        pin = f'=={expected}.*' if expected else ''
        release = torch.split('+')[0]
        yield f'{what}\n  pip install torch=={release} "torchvision{pin}"'


def _distribution_problems(stack: Stack) -> Iterator[str]:
    """Problems of the OpenMMLab packages: doubled, missing, mixed or too new."""
    wanted = PINNED[stack.distribution]
    strangers: Dict[str, str] = {}
    for package, found in stack.packages.items():
        if len(found) > 1:
            yield (
                f'{" and ".join(found)} are installed on top of each other: both bring '
                f'the package {package}, and its files are a mixture.\n'
                f'  pip uninstall -y {" ".join(found)}\n'
                f'  pip install --no-deps {_requirement(stack, package)}'
            )
        for name in found:
            is_own = name in (wanted[package][0], f'{wanted[package][0]}-lite')
            if len(found) == 1 and not is_own:
                strangers[package] = name
    missing = [package for package, found in stack.packages.items() if not found]
    if missing:
        yield (
            f'Not installed: {", ".join(missing)}.\n'
            f'  pip install {_requirement(stack, *missing)}'
        )
    if strangers:
        yield (
            f'{", ".join(strangers.values())} and the rest of the stack come from two '
            'different sets of distributions, which do not accept each other.\n'
            f'  pip uninstall -y {" ".join(strangers.values())}\n'
            f'  pip install {_requirement(stack, *strangers)}'
        )
    mmcv = stack.packages.get('mmcv', {})
    names = {name for found in stack.packages.values() for name in found}
    # The commands above may change the version of mmcv.
    for name, version in mmcv.items() if len(mmcv) == 1 and not strangers else ():
        refusing = [
            f'{user} (>={low}, <{high})'
            for user, (low, high) in MMCV_RANGES.items()
            if user in names and not _release(low) <= _release(version) < _release(high)
        ]
        if refusing:
            yield (
                f'{name} {version} is not accepted by {", ".join(refusing)}.\n'
                f'  pip uninstall -y {name}\n'
                f'  pip install --no-deps {_requirement(stack, "mmcv")}'
            )
    if 'mmengine' in names and not stack.has_pkg_resources:
        yield (
            'mmengine imports pkg_resources, which the installed setuptools no longer '
            f'has (Python {platform.python_version()}).\n'
            f'  pip install "{pins.ORIGINAL_SETUPTOOLS}"'
        )


def _requirement_problems(stack: Stack) -> Iterator[str]:
    missing: Dict[str, Unmet] = {}
    unfit: Dict[str, Unmet] = {}
    for unmet in stack.unmet:
        if unmet.installed:
            # Many environments run with versions that a package does not want. They
            # count for OpenMMLab's packages, and if something does not import.
            if unmet.name in VERSIONS or stack.failures:
                unfit.setdefault(unmet.name, unmet)
        elif unmet.name not in _KNOWN_BY_IMPORT and unmet.name not in VERSIONS:
            missing.setdefault(unmet.name, unmet)
    if missing:
        names = ', '.join(f'{m.name} (for {m.user})' for m in missing.values())
        wanted = ' '.join(_quoted(m.requirement) for m in missing.values())
        yield f'Not installed: {names}.\n  pip install {wanted}'
    for unmet in unfit.values():
        pin = VERSIONS.get(unmet.name)
        yield (
            f'{unmet.name} {unmet.installed} is not accepted by {unmet.user} '
            f'({unmet.requirement}).\n  pip install '
            + (f'{unmet.name}=={pin}' if pin else _quoted(unmet.requirement))
        )


def _quoted(requirement: str) -> str:
    """A requirement as a word of a shell."""
    return f'"{requirement}"' if re.search('[<>=!~]', requirement) else requirement


def _import_problems(stack: Stack, with_command: bool) -> Iterator[str]:
    """Modules that do not import for a reason that no other problem names."""
    named = {
        'pkg-resources',
        *stack.import_errors,
        *(name for name, found in stack.packages.items() if not found),
        *(unmet.name for unmet in stack.unmet if not unmet.installed),
    }
    errors = [one_line(text) for text in stack.import_errors.values()]
    by_error: Dict[str, List[ImportFailure]] = {}
    for failure in stack.failures:
        is_named = failure.not_found and _spelling(failure.not_found) in named
        if not is_named and not any(e and e in failure.error for e in errors):
            by_error.setdefault(failure.error, []).append(failure)
    for error, failures in by_error.items():
        modules = ', '.join(failure.module for failure in failures)
        command = _command_for(failures[0]) if with_command else ''
        yield f'{modules} cannot be imported: {error}{command}'


def _command_for(failure: ImportFailure) -> str:
    """The command that reinstalls what is broken, as far as it can be known."""
    distributions: Dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions():
        for file in distribution.files or ():
            distributions.setdefault(file.parts[0].split('.')[0], distribution)
    if failure.not_found and failure.not_found not in distributions:
        return f'\n  pip install {failure.not_found}   # or what has it as a module'
    for package in (failure.not_found, *failure.raised_in):
        if package in distributions:
            broken = distributions[package]
            return (
                '\n  pip install --force-reinstall --no-deps --no-cache-dir '
                f'{broken.metadata["Name"]}=={broken.version}'
            )
    return ''

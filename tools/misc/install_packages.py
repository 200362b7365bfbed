# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Install the OpenMMLab packages that the running environment lacks, and check it.

setup_env.sh calls this script, and only Python may be there. uv installs everything at
once; pip does so if uv does not work or if the variable UV is empty. Installed packages
stay as they are.
"""

import argparse
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

ROOT = Path(__file__).resolve().parents[2]
# Importing the package would import PyTorch.
PINS = runpy.run_path(str(ROOT / 'mlla_mm' / 'compat' / 'versions.py'))
STACKS = {'onedl': PINS['FORK'], 'openmmlab': PINS['ORIGINAL']}
OPENCV = ('opencv-python-headless', 'opencv-python')


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--tests', action='store_true', help='also what tests need')
    parser.add_argument(
        '--own',
        action='store_true',
        help='also PyTorch and this clone, in an environment that setup_env.sh made',
    )
    return parser.parse_args(argv)


class Plan(NamedTuple):
    """What to install.

    Args:
        title (str): Name of the plan, to print.
        requirements (list[str]): Lines of a requirements file.
        clone (bool): Whether to install this clone, too.
        constraints (list[str]): Installed versions that stay.
        build_constraints (list[str]): Versions of build tools.
        opencv (str, optional): The only package of OpenCV to install. None means that
            two are installed already, and stay.
    """

    title: str
    requirements: List[str]
    clone: bool
    constraints: List[str]
    build_constraints: List[str]
    opencv: Optional[str]


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    importable = {name for name in (*PINS['FORK'], 'cv2') if find_spec(name)}
    plan = make_plan(installed(), importable, args.own, args.tests)
    complete = not (plan.requirements or plan.clone)
    checked = Path(sys.prefix) / 'mlla_mm_checked'
    if complete and is_up_to_date(checked):
        return
    if args.own:
        log = Path(sys.prefix) / 'setup.log'
    else:
        log = Path(tempfile.mkstemp(prefix='mlla_mm_setup_', suffix='.log')[1])
    log.write_text('')
    if not complete:
        install(plan, log)
    check(log)
    if os.access(sys.prefix, os.W_OK):
        checked.touch()
    if not args.own:
        log.unlink()


def normalized(name: str) -> str:
    return re.sub(r'[-_.]+', '-', name).lower()


def name_of(requirement: str) -> str:
    return normalized(re.split(r'[^\w.-]', requirement)[0])


def installed() -> Dict[str, str]:
    """Versions of the installed distributions."""
    # A build may have left a distribution in the clone, which is not installed.
    path = [folder for folder in sys.path if Path(folder).resolve() != ROOT]
    found: Dict[str, str] = {}
    for distribution in distributions(path=path):
        # The remains of a removed distribution may have no name.
        found.setdefault(
            normalized(distribution.metadata['Name'] or ''), distribution.version
        )
    return found


def choose_stack(found: Dict[str, str]) -> str:
    """Return the stack in use, or the one that is asked for, or the default."""
    used = {
        stack: sum(normalized(name) in found for name, _ in packages.values())
        for stack, packages in STACKS.items()
    }
    if any(used.values()):
        return max(used, key=lambda stack: used[stack])
    # The fork needs Python 3.10 and NumPy 2, and NumPy 2 needs PyTorch 2.3.
    torch = tuple(map(int, re.findall(r'\d+', found.get('torch', '2.3'))[:2]))
    new = sys.version_info >= (3, 10) and torch >= (2, 3)
    default = 'onedl' if new else 'openmmlab'
    stack = os.environ.get('OPENMMLAB_STACK') or default
    if stack not in STACKS:
        raise SystemExit(
            f'Error: OPENMMLAB_STACK is {stack!r}. Choose one of '
            f'{" and ".join(STACKS)}.'
        )
    return stack


def make_plan(
    found: Dict[str, str], importable: Set[str], own: bool, tests: bool
) -> Plan:
    """Find out what is missing.

    Args:
        found (dict[str, str]): Installed versions by distribution.
        importable (set[str]): Those of OpenMMLab's packages and cv2 that can be found.
        own (bool): Whether PyTorch and this clone are needed.
        tests (bool): Whether the requirements of the tests are needed.

    Returns:
        Plan: It has no requirements if nothing is missing.
    """
    extras = PINS['EXTRAS']
    stack = choose_stack(found)
    titles, requirements = [], []
    if own and not {'torch', 'torchvision'} <= found.keys():
        old = stack == 'openmmlab' and sys.version_info < (3, 12)
        requirements += extras['torch21' if old else 'torch']
        titles.append(f'PyTorch {PINS["TORCH_ORIGINAL" if old else "TORCH"][0]}')

    # Some packages have no metadata, such as a clone on PYTHONPATH.
    modules = {package: name for package, (name, _) in STACKS[stack].items()}
    packages = {*modules.values()}
    modules['cv2'] = 'opencv-python'
    there = {*found, *(modules[module] for module in importable if module in modules)}
    if not packages <= there:
        # The bounds of what is installed also count.
        keep = packages & there
        requirements += [line for line in extras[stack] if name_of(line) not in keep]
        titles.append('OpenMMLab')

    others = [*extras[stack], *PINS['RUNTIME']]
    if tests:
        others += [*extras['tests'], *extras['docs']]
        # ONNX would bring NumPy 2 to the original packages.
        others += extras['export'] if stack == 'onedl' else []
    absent = [
        line
        for line in others
        if name_of(line) not in there and line not in requirements
    ]
    clone = own and 'mlla-mm' not in found
    if not titles:
        names = [name_of(line) for line in absent] or ['mlla_mm']
        titles.append(', '.join(names) if len(names) < 5 else f'{len(names)} packages')

    stay = ['torch', 'torchvision']
    stay += [name for pins in STACKS.values() for name, _ in pins.values()]
    opencv = [name for name in OPENCV if name in found]
    return Plan(
        title=' and '.join(titles),
        requirements=[*requirements, *absent],
        clone=clone,
        constraints=[f'{name}=={found[name]}' for name in stay if name in found],
        build_constraints=[PINS['ORIGINAL_SETUPTOOLS']] if stack == 'openmmlab' else [],
        opencv=None if len(opencv) == 2 else (opencv or OPENCV)[0],
    )


def is_up_to_date(checked: Path) -> bool:
    """Whether nothing was installed or removed since the last check."""
    folders = {sysconfig.get_path(name) for name in ('purelib', 'platlib')}
    return checked.exists() and all(
        Path(folder).stat().st_mtime <= checked.stat().st_mtime for folder in folders
    )


def install(plan: Plan, log: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:

        def file(name: str, lines: Sequence[str]) -> str:
            path = Path(folder) / name
            path.write_text(''.join(f'{line}\n' for line in lines))
            return str(path)

        clone = ['--editable', str(ROOT)] if plan.clone else []
        constraints = file('constraints.txt', plan.constraints)
        build = file('build.txt', plan.build_constraints)
        uv = find_uv(log)
        if uv:
            requirements, overrides = one_opencv(plan)
            command = [
                *(*uv, 'pip', 'install', '--python', sys.executable, *clone),
                *('--requirement', file('requirements.txt', requirements)),
                *('--constraint', constraints, '--build-constraint', build),
                *('--override', file('overrides.txt', overrides)),
            ]
            if step(f'Installing {plan.title}', command, log, uv_environment()):
                return
            print(f'uv does not work here (see {log}); pip does the same.')
        # An isolated build does not see PyTorch, so mmcv is built without its ops. They
        # would take 15 minutes. pip before 25.3 needs PIP_USE_PEP517 to isolate the
        # build of the original mmcv, and reads the build's constraints from variables.
        both = file('both.txt', [*plan.constraints, *plan.build_constraints])
        command = [
            *(sys.executable, '-m', 'pip', 'install', *clone),
            *('--requirement', file('requirements.txt', plan.requirements)),
        ]
        environment = dict(
            PIP_CONSTRAINT=both, PIP_BUILD_CONSTRAINT=both, PIP_USE_PEP517='1'
        )
        if not step(f'Installing {plan.title} by pip', command, log, environment):
            fail('Not installed.', log)


def one_opencv(plan: Plan) -> Tuple[List[str], List[str]]:
    """Leave out one of the two packages of OpenCV, as only uv can do.

    imaug requires both, and they write the same files. The headless one does not need
    libGL, which servers and containers lack.

    Returns:
        tuple[list[str], list[str]]: Requirements and overrides for uv.
    """
    if not plan.opencv:
        return plan.requirements, []
    requirements = [
        re.sub(r'^opencv-python(?=\W|$)', plan.opencv, line)
        for line in plan.requirements
    ]
    never = [f'{n}; python_version < "0"' for n in OPENCV if n != plan.opencv]
    return requirements, never


def find_uv(log: Path) -> Optional[List[str]]:
    """Return the command of uv, which is installed if it is missing. None means pip."""
    uv = os.environ.get('UV', shutil.which('uv'))
    if uv is not None:
        return [uv] if uv else None
    command = [sys.executable, '-m', 'uv']
    if find_spec('uv'):
        return command
    pip = [sys.executable, '-m', 'pip', 'install', 'uv']
    return command if step('Installing uv', pip, log) else None


def uv_environment() -> Dict[str, str]:
    """Variables that give uv the package indexes of pip's configuration."""
    if any(os.environ.get(name) for name in ('UV_DEFAULT_INDEX', 'UV_INDEX_URL')):
        return {}
    result = subprocess.run(
        [sys.executable, '-m', 'pip', 'config', 'list'], capture_output=True, text=True
    )
    found: Dict[str, str] = {}
    # pip lists environment variables first, and they count most.
    for key, value in re.findall(r"^[^=]*\.([\w-]+)='(.*)'$", result.stdout, re.M):
        found.setdefault(key, value.replace('\\n', ' ').strip())
    environment = {
        'UV_DEFAULT_INDEX': found.get('index-url'),
        'UV_INDEX': found.get('extra-index-url'),
        # As pip, take the best version of all indexes.
        'UV_INDEX_STRATEGY': 'unsafe-best-match' if 'extra-index-url' in found else '',
    }
    return {name: value for name, value in environment.items() if value}


def check(log: Path) -> None:
    """Run collect_env, which looks for problems."""
    python_path = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])
    )
    command = [sys.executable, '-m', 'mlla_mm.utils.collect_env']
    begin = log.stat().st_size
    if not step('Checking the environment', command, log, {'PYTHONPATH': python_path}):
        report = log.read_bytes()[begin:].decode(errors='replace')
        print(report[max(report.find('Problems found:'), 0) :])
        fail('The environment has problems.', log, lines=0)


def step(
    title: str,
    command: List[str],
    log: Path,
    variables: Optional[Dict[str, str]] = None,
) -> bool:
    """Run a command, print one line with its time, and log what it prints."""
    print(title, end=' ... ', flush=True)
    start = time.monotonic()
    with log.open('a') as out:
        print('$', shlex.join(command), file=out, flush=True)
        status: Union[int, OSError]
        try:
            status = subprocess.run(
                command,
                env={**os.environ, **(variables or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            ).returncode
        except OSError as error:
            status = error
            print(error, file=out)
    taken = f'{time.monotonic() - start:.0f} s'
    print(taken if status == 0 else f'failed after {taken}', flush=True)
    return status == 0


def fail(what: str, log: Path, lines: int = 15) -> None:
    tail = log.read_text(errors='replace').splitlines()[-lines:] if lines else []
    raise SystemExit('\n'.join([*tail, f'Error: {what} The log is {log}']))


if __name__ == '__main__':
    main()

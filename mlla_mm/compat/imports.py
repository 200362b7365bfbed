# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Which modules do not import, and why.

Run as a script it is the process that tries. It imports the standard library alone,
because what it looks for is a broken environment.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Optional


@dataclass
class ImportFailure:
    """A module that does not import.

    Args:
        module (str): Its name.
        error (str): Type and text of the error that everything began with.
        not_found (str, optional): The package that is not there, if that is the error.
            Defaults to None.
        raised_in (list[str]): Packages that were being imported, the innermost first.
            Defaults to an empty list.
    """

    module: str
    error: str
    not_found: Optional[str] = None
    raised_in: list[str] = field(default_factory=list)


def find_import_failures(modules: Sequence[str]) -> list[ImportFailure]:
    """Import modules one after the other, in processes of their own.

    What fails after another module did may fail because of that one, half imported, so
    it gets a new process.

    Args:
        modules (Sequence[str]): Names of modules. The first comes before all others in
            every process.

    Returns:
        list[ImportFailure]: Those that do not import.
    """
    failures, left = [], list(modules)
    while left:
        failed, not_reached = _try_in_process(modules[0], left)
        if not failed:
            break
        # With the same error it has the same reason.
        failures += [f for f in failed if f.error == failed[0].error]
        left = [f.module for f in failed if f.error != failed[0].error] + not_reached
    return failures


def one_line(text: str) -> str:
    """The beginning of a message, without its line breaks."""
    return ' '.join(text.split())[:300]


def _try_in_process(
    first: str, modules: list[str]
) -> tuple[list[ImportFailure], list[str]]:
    """Import modules until one ends Python: failures, and the rest."""
    # Not by its path: that would put this folder where Python looks for modules.
    code = f'import runpy; runpy.run_path({__file__!r}, run_name="__main__")'
    result = subprocess.run(
        [sys.executable, '-c', code, first, *modules],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    tried = dict(json.loads(line) for line in result.stdout.splitlines())
    failures = [ImportFailure(name, **tried[name]) for name in tried if tried[name]]
    not_reached = modules[len(tried) :]
    if not_reached:
        error = f'Python ended with status {result.returncode}'
        failures.append(ImportFailure(not_reached[0], error))
    return failures, not_reached[1:]


def _try_to_import(name: str) -> Optional[dict]:
    """Import a module; returns the failure's fields, or None."""
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:
        while error.__cause__:
            error = error.__cause__
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        packages = [_package(frame.f_globals.get('__name__', '')) for frame in frames]
        found = not isinstance(error, ModuleNotFoundError) or error.name is None
        return dict(
            error=f'{type(error).__name__}: {one_line(str(error))}',
            not_found=None if found else _package(error.name),
            raised_in=list(dict.fromkeys(reversed(packages))),
        )
    return None


def _package(module: str) -> str:
    return module.split('.')[0]


def _main() -> None:
    # Whatever the modules print must not come between the results.
    results = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    first, *modules = sys.argv[1:]
    if first not in modules:
        _try_to_import(first)
    for name in modules:
        print(json.dumps([name, _try_to_import(name)]), file=results, flush=True)


if __name__ == '__main__':
    _main()

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Finds modules that do not import, and the reasons.

A process of its own runs this file as a script and imports the modules. The file itself
imports only the standard library, because it has to work in a broken environment.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple


@dataclass
class ImportFailure:
    """A module that does not import.

    Args:
        module (str): Name of the module.
        error (str): Type and text of the first error in the chain of causes.
        not_found (str, optional): The missing package, if this is the error. Defaults
            to None.
        raised_in (list[str]): Packages that were being imported, the innermost first.
            Defaults to an empty list.
    """

    module: str
    error: str
    not_found: Optional[str] = None
    raised_in: List[str] = field(default_factory=list)


def find_import_failures(modules: Sequence[str]) -> List[ImportFailure]:
    """Import modules in other processes, one after the other.

    A module that failed is half imported and may cause the next failures. So modules
    that fail later with another error are tried again in a new process.

    Args:
        modules (Sequence[str]): Names of modules. Every process imports the first one
            first.

    Returns:
        list[ImportFailure]: The modules that do not import.
    """
    failures: List[ImportFailure] = []
    left = list(modules)
    while left:
        failed, not_reached = _try_in_process(modules[0], left)
        if not failed:
            break
        # The same error has the same reason.
        failures += [f for f in failed if f.error == failed[0].error]
        left = [f.module for f in failed if f.error != failed[0].error] + not_reached
    return failures


def one_line(text: str) -> str:
    """The first 300 characters of a message, without line breaks."""
    return ' '.join(text.split())[:300]


def _try_in_process(
    first: str, modules: List[str]
) -> Tuple[List[ImportFailure], List[str]]:
    """Import modules in a process until one ends it.

    Returns:
        tuple[list[ImportFailure], list[str]]: The failures, and the modules that were
        not tried.
    """
    # `python PATH` would make Python look for modules in the folder of this file.
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


def _try_to_import(name: str) -> Optional[Dict[str, Any]]:
    """Import a module. Return the fields of a failure, or None."""
    try:
        importlib.import_module(name)
        return None
    except (Exception, SystemExit) as error:
        cause: BaseException = error
    while cause.__cause__:
        cause = cause.__cause__
    frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
    modules = [frame.f_globals.get('__name__', '') for frame in reversed(frames)]
    missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
    return dict(
        error=f'{type(cause).__name__}: {one_line(str(cause))}',
        not_found=missing.split('.')[0] if missing else None,
        raised_in=list(dict.fromkeys(module.split('.')[0] for module in modules)),
    )


def _main() -> None:
    # Keep what the modules print out of the results.
    results = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    first, *modules = sys.argv[1:]
    if first not in modules:
        _try_to_import(first)
    for name in modules:
        print(json.dumps([name, _try_to_import(name)]), file=results, flush=True)


if __name__ == '__main__':
    _main()

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Reads configs, and says how a run differs from its config."""

import copy
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Optional, Tuple

from mmengine.config import Config

from ..compat.openmmlab import lay_out_configs_once
from ..utils.text import PATH_LIMIT, printable


def read_config(path: str, options: Optional[dict] = None) -> Config:
    """Read a config file and merge ``--cfg-options`` into it.

    The config need not import the classifiers of this package: they are registered if
    its default scope is mmpretrain.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a file of another kind, such as a checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'Config not found: {path}. See configs/ for ours.')
    if Path(path).suffix not in ('.py', '.json', '.yaml', '.yml'):
        raise ValueError(
            f'{printable(path, PATH_LIMIT)} is no config, whose name would end in .py: '
            'check the order of the arguments.'
        )
    cfg = Config.fromfile(path)
    if options:
        cfg.merge_from_dict(options)
    if cfg.get('default_scope') == 'mmpretrain':
        import_module('mlla_mm.models.classifiers')
    return cfg


def read_run_config(path: str) -> Tuple[Config, Config]:
    """Read the config of a run.

    Returns:
        tuple[Config, Config]: The config as it is written, and a copy for the options
        of the command line.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    lay_out_configs_once()
    written = read_config(path)
    written.setdefault('launcher', 'none')  # as in MMEngine
    return written, copy.deepcopy(written)


def print_changes(written: Config, run: Config) -> None:
    """Print :func:`describe_changes`, if there are any."""
    changes = list(describe_changes(written.to_dict(), run.to_dict()))
    if changes:
        lines = [f'{run.filename} is run with these changes:', *changes]
        print('\n  '.join(lines), flush=True)


_NOTHING = object()


def describe_changes(written: Any, run: Any, key: str = '') -> Iterator[str]:
    """Compare the config that is run with the one that was read.

    Args:
        written (Any): The config as it was read, or a part of it.
        run (Any): The config that is run, or the same part of it.
        key (str): Where the part is in the config. Defaults to '', the whole config.

    Yields:
        str: ``KEY: OLD -> NEW`` for each value that was changed, added or removed.
        ``-`` stands for no value. Long values are cut in the middle.
    """
    if isinstance(written, list) and isinstance(run, list) and len(written) <= len(run):
        written, run = dict(enumerate(written)), dict(enumerate(run))
    if isinstance(written, dict) and isinstance(run, dict):
        for name in {**written, **run}:
            old, new = written.get(name, _NOTHING), run.get(name, _NOTHING)
            yield from describe_changes(old, new, f'{key}.{name}' if key else str(name))
    elif written != run:
        old, new = (
            '-' if value is _NOTHING else printable(repr(value))
            for value in (written, run)
        )
        yield f'{key}: {old} -> {new}'

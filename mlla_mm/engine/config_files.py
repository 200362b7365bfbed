# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Reads configs, and says how a run differs from its config."""

import copy
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Optional, Tuple

from mmengine.config import Config

from ..compat.openmmlab import lay_out_configs_once
from ..utils.text import PATH_LIMIT, describe_error, printable
from .option_keys import describe_old_keys, describe_unused, require_place, require_read
from .parts import as_list, require_kinds


def read_config(path: str, options: Optional[dict] = None) -> Config:
    """Read a config file and merge ``--cfg-options`` into it.

    The config need not import the classifiers of this package: they are registered if
    its default scope is mmpretrain.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a file of another kind, such as a checkpoint, or if the
            options or ``custom_imports`` cannot be applied.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'Config not found: {path}. See configs/ for ours.')
    if Path(path).suffix not in ('.py', '.json', '.yaml', '.yml'):
        raise ValueError(
            f'{printable(path, PATH_LIMIT)} is no config, whose name would end in .py: '
            'check the order of the arguments.'
        )
    try:
        # MMEngine's own error would leave out why a module cannot be imported.
        cfg = Config.fromfile(path, import_custom_modules=False)
    except Exception as error:
        raise ValueError(
            f'{printable(path, PATH_LIMIT)}, or a config that it inherits from, cannot '
            f'be read: {_describe(error)}.'
        ) from error
    import_modules(cfg)
    merge_options(cfg, options)
    require_kinds(cfg)
    if cfg.get('default_scope') == 'mmpretrain':
        import_module('mlla_mm.models.classifiers')
    return cfg


def _describe(error: Exception) -> str:
    """An error of a config. MMEngine does not tell the file of one of syntax."""
    if isinstance(error, SyntaxError) and error.text:
        line = printable(error.text.strip())
        return f'{error.msg.rstrip(".")}, line {error.lineno}: {line}'
    return describe_error(error)


def merge_options(cfg: Config, options: Optional[Mapping[str, Any]]) -> None:
    """Merge ``--cfg-options`` into a config.

    New keys are fine below what the config has, for instance for arguments of a class.
    A None that gets keys becomes a dict.

    Args:
        cfg (Config): The config as it was read; changed in place.
        options (Mapping, optional): Values by keys with dots. An item of a list is
            ``KEY.0`` or ``KEY[0]``.

    Raises:
        ValueError: If nothing would read a key, or if what is above it in the config
            has no keys. Names the key that is meant.
    """
    if not options:
        return
    options = {re.sub(r'\[(\d+)\]', r'.\1', key): x for key, x in options.items()}
    require_read(cfg, options)
    require_place(cfg, options)
    _remove_none(cfg, options)
    try:
        cfg.merge_from_dict(dict(options))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f'--cfg-options {" ".join(map(printable, options))} contradict one another '
            f'or the config ({describe_error(error)}).'
        ) from error
    if any(key.startswith('custom_imports') for key in options):
        import_modules(cfg)


def _remove_none(cfg: Config, options: Mapping[str, Any]) -> None:
    """Remove each None that gets keys, as MMEngine merges no dict into it."""
    for key in options:
        value: Any = cfg
        for name in key.split('.')[:-1]:
            if isinstance(value, list):
                value = value[int(name)]
            elif not isinstance(value, (dict, Config)):
                break  # a text, say, that _delete_ removes
            elif value.get(name) is None:
                value.pop(name, None)
                break
            else:
                value = value[name]


def import_modules(cfg: Config) -> None:
    """Import the modules that a config names in ``custom_imports``.

    They may also lie in the folder where the tool was started.

    Args:
        cfg (Config): The config as it was read.

    Raises:
        ValueError: If ``custom_imports`` has another form than MMEngine's, or if a
            module cannot be imported. Names the module and the cause.
    """
    custom = cfg.get('custom_imports') or {}
    names = custom.get('imports') if isinstance(custom, Mapping) else custom
    modules = as_list(names)
    well_formed = isinstance(custom, Mapping) and isinstance(names or [], (str, list))
    if not (well_formed and all(isinstance(name, str) for name in modules)):
        shown = [name for name in modules if isinstance(name, str)] or ['my_package']
        raise ValueError(
            'custom_imports has another form than MMEngine reads: write '
            f'custom_imports = dict(imports={shown}, allow_failed_imports=False).'
        )
    unknown = [x for x in custom if x not in ('imports', 'allow_failed_imports')]
    if unknown:
        raise ValueError(
            f'custom_imports.{unknown[0]} is not read: custom_imports has the keys '
            'imports and allow_failed_imports.'
        )
    if modules and os.getcwd() not in sys.path:
        # The last place, so that no file there hides an installed module.
        sys.path.append(os.getcwd())
    for name in modules:
        try:
            import_module(name)
        except ImportError as error:
            text = _why_not_imported(name, error)
            if not custom.get('allow_failed_imports'):
                raise ValueError(text) from error
            warnings.warn(text, stacklevel=2)


def _why_not_imported(name: str, error: ImportError) -> str:
    if error.name and f'{name}.'.startswith(f'{error.name}.'):
        return (
            f'custom_imports names {printable(name)}, but there is no module '
            f'{error.name}. Start from the folder that holds it, or name this folder '
            'in the environment: PYTHONPATH=FOLDER.'
        )
    *_, last = traceback.extract_tb(error.__traceback__)
    return (
        f'custom_imports names {printable(name)}, which cannot be imported: '
        f'{describe_error(error)} ({last.filename}, line {last.lineno}).'
    )


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


def print_unread_keys(written: Config) -> None:
    """Print which names of a config file nothing reads, if there are any.

    Args:
        written (Config): The config as it was read.
    """
    old = describe_old_keys(written)
    for text in [*([old] if old else []), *describe_unused(written)]:
        print(text, flush=True)


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

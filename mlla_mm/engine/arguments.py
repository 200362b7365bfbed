# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Names the key of a config that a class does not take, or the one that it lacks."""

import inspect
import re
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, List, Optional

from mmengine.config import Config

from ..compat.openmmlab import innermost_build
from ..utils.text import describe_error, listed, nearest
from .parts import kind_of, paths_of

_REFUSED = re.compile(r"got an unexpected keyword argument '(\w+)'")
_MISSING = re.compile(r"missing \d+ required [\w-]+ arguments?: '(\w+)'")
_TWICE = re.compile(r"got multiple values for (?:keyword )?argument '(\w+)'")


class ArgumentError(ValueError):
    """A part of a config has an argument too many, lacks one, or has a wrong one."""


@contextmanager
def named_arguments(cfg: Config) -> Iterator[None]:
    """Turn the TypeError of a refused or missing argument into one of the config.

    So does the error that a class raises itself because a value is wrong. An error that
    has another cause, such as a mistake in a class, stays as it is.

    Args:
        cfg (Config): The config of what is built.

    Raises:
        ArgumentError: Names the key, and the arguments that exist.
    """
    try:
        yield
    except _OF_ARGUMENTS as error:
        text = describe_argument(error, cfg) or _describe_refusal(error, cfg)
        if text is None:
            raise
        raise ArgumentError(text) from error


def describe_argument(error: BaseException, cfg: Config) -> Optional[str]:
    """Say which key of a config a class refuses or lacks; None for other errors.

    Args:
        error (BaseException): What was raised when a part of the config was built.
        cfg (Config): The config.
    """
    built = innermost_build(error) if isinstance(error, TypeError) else None
    if built is None:
        return None
    kind, args = built
    known = arguments_of(kind)
    missing = _MISSING.search(str(error))
    if missing:
        name = missing[1]
        if name not in known or name in args:
            return None
        place = _place(cfg, kind, args, lambda part: name not in part)
        return f'{place or _name(kind)} lacks {name}, which {_name(kind)} needs.'
    refused = _REFUSED.search(str(error)) or _TWICE.search(str(error))
    if refused is None:
        return None
    name = refused[1]
    if name in args and (name not in known or _TWICE.search(str(error))):
        place = _place(cfg, kind, args, lambda part: name in part)
        below = [
            '.'.join(path)
            for path, _ in paths_of(cfg)
            if path[-1] == name and '.'.join(path[:-2]).startswith(place or '-')
            if not name.isdigit()
        ]
        # MMEngine itself gives objects, such as the runner.
        of_config = [
            x
            for x in known
            if isinstance(args.get(x), _OF_CONFIGS) and x not in _OF_MMENGINE
        ]
        key = f'{place}.{name}' if place else name
        return _refusal(key, name, kind, of_config, below)
    # Layers of norm_cfg and the like are built without a registry's function.
    for path, part in paths_of(args):
        if isinstance(part, Mapping) and 'type' in part and name in part:
            place = _place(cfg, kind, args)
            keys = '.'.join([*([place] if place else []), *path, name])
            return f'{keys}: {describe_error(error)}.'
    return None


def require_arguments(kind: Any, given: Mapping, key: str) -> None:
    """Refuse arguments that a class does not take, before it is built.

    Args:
        kind (type): The class. One that takes any arguments is not checked.
        given (Mapping): The arguments.
        key (str): Where the config has them.

    Raises:
        ArgumentError: Names the first key, and the arguments that exist.
    """
    unknown = unknown_arguments(kind, given)
    if unknown:
        known = inspect.signature(kind).parameters
        raise ArgumentError(_refusal(f'{key}.{unknown[0]}', unknown[0], kind, known))


def unknown_arguments(kind: Any, given: Mapping) -> List[str]:
    """The arguments that a class does not take; none if it takes any."""
    known = inspect.signature(kind).parameters
    if any(x.kind is x.VAR_KEYWORD for x in known.values()):
        return []
    return [name for name in given if name not in known]


# Of their derived classes, each has a message of its own.
_OF_ARGUMENTS = (AssertionError, ImportError, RuntimeError, TypeError, ValueError)


def _describe_refusal(error: BaseException, cfg: Config) -> Optional[str]:
    """Name the part that a class refuses with an error of its own; else None."""
    if type(error) not in _OF_ARGUMENTS or not str(error) or not _is_raised(error):
        return None
    if isinstance(error, ImportError):
        return str(error)  # says what to install
    built = innermost_build(error)
    if built is None:
        return None
    return f'{_place(cfg, *built) or _name(built[0])}: {describe_error(error)}'


def _is_raised(error: BaseException) -> bool:
    """Whether code says itself that something is wrong, and in Python."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return (last.line or '').startswith(('raise ', 'assert '))


def _refusal(
    key: str, name: str, kind: Any, names: Collection[str], below: Sequence[str] = ()
) -> str:
    """Say that an argument does not exist, and which do: also in parts below."""
    near = nearest(name, names)
    meant = below or ([near] if near else [])
    hint = f' Is {listed(meant, "or")} meant?' if meant else ''
    return (
        f'{key}: {_name(kind)} takes no {name}.{hint} '
        f'It takes {", ".join(names) or "none"}.'
    )


# Arguments that MMEngine gives.
_OF_MMENGINE = ('params', 'dataloader')
_OF_CONFIGS = (str, int, float, list, tuple, dict, type(None))


def arguments_of(kind: Any) -> List[str]:
    """The arguments of a class or a function by their names.

    A class that takes any others hands them to its base class.
    """
    names: List[str] = []
    inits = [kind]
    if inspect.isclass(kind):
        own = (vars(x).get('__init__') for x in kind.__mro__)
        inits = [init for init in own if init not in (None, object.__init__)]
    for init in inits:
        try:
            parameters = inspect.signature(init).parameters.values()
        except (TypeError, ValueError):  # of C code
            return names
        names += [
            x.name
            for x in parameters
            if x.kind in (x.POSITIONAL_OR_KEYWORD, x.KEYWORD_ONLY)
            and x.name not in ('self', *names)
        ]
        if not any(x.kind is x.VAR_KEYWORD for x in parameters):
            break
    return names


def _name(kind: Any) -> str:
    return getattr(kind, '__name__', str(kind))


def _place(
    cfg: Config,
    kind: Any,
    args: Mapping,
    fits: Callable[[Mapping], bool] = lambda part: True,
) -> Optional[str]:
    """The key of the dict from which something was built; None if it is unclear."""
    parts = [
        ('.'.join(path), part)
        for path, part in paths_of(cfg)
        if isinstance(part, dict) and fits(part)
    ]
    same = [path for path, part in parts if _is_source(part, args)]
    alike = [path for path, part in parts if kind_of(part) == _name(kind)]
    only = [path for path, _ in parts] if len(parts) == 1 else []
    return next(iter([*same, *alike, *only]), None)


# What MMEngine takes out of a dict before it builds from it.
_TAKEN = ('type', '_scope_', 'priority', 'constructor', 'convert_to_iter_based')


def _is_source(part: Mapping, args: Mapping) -> bool:
    keys = [key for key in part if key not in _TAKEN]
    return bool(keys) and all(key in args and args[key] == part[key] for key in keys)

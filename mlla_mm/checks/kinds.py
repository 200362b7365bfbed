# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Finds the classes that a config names, and whose they are."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Tuple

from mmengine.config import Config
from mmengine.registry import HOOKS, Registry

from ..engine.parts import named_hooks

PACKAGES = {'mmengine', 'mmdet', 'mmseg', 'mmpretrain', 'mlla_mm'}
"""What their classes do with an argument is known. A user's own class may give another
meaning to an argument of its base class."""


def class_of(registry: Registry, kind: Any) -> Any:
    """The class of a ``type``, or None if it cannot be found."""
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(None) as scoped:
        try:
            return scoped.get(kind)
        except (ImportError, RuntimeError):
            return None


def package_of(registry: Registry, part: Mapping) -> str:
    """The package of a part's type; empty if it is unknown."""
    kind = class_of(registry, part.get('type'))
    return str(getattr(kind, '__module__', '')).partition('.')[0]


def is_known(registry: Registry, part: Mapping) -> bool:
    """Whether a part's type is of one of :data:`PACKAGES`."""
    return package_of(registry, part) in PACKAGES


def is_kind(registry: Registry, part: Mapping, kind: type) -> bool:
    """Whether a part's type is a class, or one that is derived from it."""
    found = class_of(registry, part.get('type'))
    return inspect.isclass(found) and issubclass(found, kind)


def known_hooks(cfg: Config) -> Iterator[Tuple[str, Mapping]]:
    """The hooks of a run whose arguments mean what they do in MMEngine."""
    return ((key, hook) for key, hook in named_hooks(cfg) if is_known(HOOKS, hook))

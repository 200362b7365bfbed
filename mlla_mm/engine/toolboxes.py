# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Runs load the toolbox of their task, and not those that it could use besides."""

import sys
from importlib.machinery import ModuleSpec
from typing import FrozenSet, Optional

from mmengine.config import Config

TOOLBOXES = frozenset(('mmdet', 'mmseg', 'mmpretrain'))
# By name: what they import would import toolboxes.
OUR_LOOPS = ('SeededEpochBasedTrainLoop', 'SeededIterBasedTrainLoop')


def load_own_toolbox_alone(config: str) -> None:
    """Keep the config's toolbox from importing the others, in this process.

    mmdet, mmseg and mmpretrain import one another if they can, for a few models, and do
    without if they cannot. That costs every process of a run seconds and memory. What
    the config names is imported, and what anyone but a toolbox imports. A config that
    names none of our loops may have one of those models: nothing is kept from it.

    Args:
        config (str): Path of the config; a missing file is left to who reads it.
    """
    try:
        # The config's own imports, which may be of a toolbox, have to come later.
        cfg = Config.fromfile(config, import_custom_modules=False)
    except FileNotFoundError:
        return
    text = str(cfg)
    if not any(name in text for name in OUR_LOOPS):
        return
    unused = frozenset(name for name in TOOLBOXES if name not in text)
    if unused:
        sys.meta_path.insert(0, _Refuse(unused))


class _Refuse:
    """Finder of modules that lets toolboxes import some others in vain.

    Args:
        names (frozenset[str]): The toolboxes that they do not get.
    """

    def __init__(self, names: FrozenSet[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path=None, target=None) -> Optional[ModuleSpec]:
        if name in self.names and _importing_package() in TOOLBOXES:
            raise ModuleNotFoundError(f'{name} is not used by the config.', name=name)
        return None


def _importing_package() -> str:
    """Package of the module that is importing another one."""
    frame = sys._getframe(2)
    while frame.f_globals.get('__name__', '').startswith(('importlib', '_frozen')):
        frame = frame.f_back
    return frame.f_globals.get('__name__', '').partition('.')[0]

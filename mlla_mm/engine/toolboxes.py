# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""A run imports the toolbox of its task, not the others that this toolbox could use."""

import sys
import traceback
from importlib.abc import MetaPathFinder
from typing import FrozenSet

from mmengine.config import Config

TOOLBOXES = frozenset(('mmdet', 'mmseg', 'mmpretrain'))
# Names, because an import of the loops would import toolboxes.
OUR_LOOPS = ('SeededEpochBasedTrainLoop', 'SeededIterBasedTrainLoop')


def load_own_toolbox_alone(config: str) -> None:
    """Keep the config's toolbox from importing the others, in this process.

    mmdet, mmseg and mmpretrain import one another for a few models, if they can. These
    imports cost every process of a run seconds and memory. This function lets them
    fail, except for toolboxes that the config names. All other modules may still import
    every toolbox. A config that names none of our loops may need such a model, so
    nothing is kept from it.

    Args:
        config (str): Path of the config. One that cannot be read is no error here: the
            function that reads the config reports it.
    """
    try:
        # The config's own imports may need a toolbox, so they have to come later.
        cfg = Config.fromfile(config, import_custom_modules=False)
    except Exception:
        return
    text = str(cfg)
    if any(name in text for name in OUR_LOOPS):
        unused = frozenset(name for name in TOOLBOXES if name not in text)
        sys.meta_path.insert(0, _RefusingFinder(unused))


class _RefusingFinder(MetaPathFinder):
    """Lets a toolbox's import of another toolbox fail.

    Args:
        names (frozenset[str]): The toolboxes that no toolbox may import.
    """

    def __init__(self, names: FrozenSet[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path=None, target=None) -> None:
        if fullname not in self.names:
            return
        importers = (
            frame.f_globals.get('__name__', '')
            for frame, _ in traceback.walk_stack(sys._getframe(1))
        )
        importer = next(
            name for name in importers if not name.startswith(('importlib', '_frozen'))
        )
        if importer.partition('.')[0] in TOOLBOXES:
            raise ModuleNotFoundError(
                f'{fullname} is not used by the config.', name=fullname
            )

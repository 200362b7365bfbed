# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""MLLA (Mamba-Like Linear Attention) for OpenMMLab.

Importing the package registers everything that it brings in MMEngine's registries.
"""

import sys

from .version import __version__

__all__ = [
    '__version__',
    'apis',
    'checkpoints',
    'datasets',
    'engine',
    'get_model',
    'models',
    'reproducible',
]

# Python puts '-m' there while it looks for the module to run. That is collect_env,
# which has to work where the rest cannot be imported.
if sys.argv[:1] != ['-m']:
    try:
        # First of all: OpenCV reads its limits when mmcv imports it, and whatever
        # imports mmcv.ops afterwards needs ``mmcv._ext``.
        from .compat import mmcv_ext
        from .utils import images

        images.install()
        mmcv_ext.install()

        from . import apis, checkpoints, datasets, engine, models, reproducible
        from .apis import get_model
    # Mismatched binaries fail with RuntimeError, OSError, AttributeError too.
    except Exception as error:
        from .compat.stack import collect_stack, find_problems

        problems = find_problems(collect_stack())
        if not problems:
            raise
        raise ImportError('\n'.join([str(error), *problems])) from error

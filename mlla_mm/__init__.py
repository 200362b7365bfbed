# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""MLLA (Mamba-Like Linear Attention) for OpenMMLab.

Importing the package registers everything that it brings in MMEngine's registries.
"""

# First of all: whatever imports mmcv.ops afterwards needs ``mmcv._ext``.
from .ops import mmcv_ext

mmcv_ext.install()

try:
    from . import apis, engine, models  # noqa: E402
    from .apis import get_model  # noqa: E402
except ImportError as error:
    from .utils.stack import collect_stack, find_problems

    problems = '\n'.join(find_problems(collect_stack()))
    raise ImportError(f'{error}\n{problems}') from error

from .version import __version__  # noqa: E402

__all__ = ['__version__', 'apis', 'engine', 'get_model', 'models']

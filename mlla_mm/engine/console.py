# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What a run shows on the console; its log file has everything.

What other packages say that means nothing to a user is left out by name, and nothing
else is.
"""

import builtins
import logging
import warnings
from importlib.util import find_spec
from typing import Any, Optional

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..compat.openmmlab import has_logger, replace_print

#: How records begin that are for the log file.
LOG_FILE_ONLY = (
    # MMEngine describes environment, config, hooks, the rate of every parameter, and
    # what it removes.
    '\n' + '-' * 60 + '\nSystem environment:',
    'Config:\n',
    'Hooks will be executed in the following order:',
    'paramwise_options -- ',
    'Exp name: ',
    'The previous best checkpoint ',
    # What SyncBN means in one process.
    'Distributed training is not used, all SyncBatchNorm',
    # MMEngine's own calls of what it deprecates.
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
    # Metrics that name their values themselves, and those that write predictions.
    'The prefix is not set in metric class',
    # These numbers come again with their names.
    'bbox_mAP_copypaste: ',
    'segm_mAP_copypaste: ',
)
#: Patterns of warnings that say nothing about a run.
MEANINGLESS_WARNINGS = (
    # An optional package that none of our configs uses.
    'faster_coco_eval is not installed',
    # The recipe's loss averages over ignored pixels too, as mmseg's does by default.
    'Default ``avg_non_ignore`` is False',
    # mmseg draws nothing unless --show-dir asks for it.
    'The draw is False, it means that the hook for visualization',
    # mmseg's test-time augmentation gives label maps without their first axis.
    'The shape of value will convert from',
    # MMEngine's drawing of a box that ends at the edge of its picture.
    'Warning: The (bbox|polygon|text) is out of bounds',
)
#: How lines begin that MMEngine prints: about an optional package of mmdet, and what it
#: logs as "Load checkpoint from" as well.
MEANINGLESS_LINES = ('Could not import OneDL', 'Loads checkpoint by ')
# Modules of pycocotools that tell of every step.
_TALKATIVE = ('pycocotools.coco', 'pycocotools.cocoeval')


def quiet(scope: Optional[str] = None) -> None:
    """Leave out what means nothing to a user, in this process and its workers.

    Call it before the toolbox is imported.

    Args:
        scope (str, optional): The toolbox of a run. Of mmdet, what pycocotools prints
            goes to the log file. Defaults to None.
    """
    for message in MEANINGLESS_WARNINGS:
        warnings.filterwarnings('ignore', message)
    replace_print('mmengine.logging.logger', _print_meaningful)
    if scope == 'mmdet' and find_spec('pycocotools'):
        for name in _TALKATIVE:
            replace_print(name, _print_to_log_file)


def build_runner(cfg: Config, verbose: bool) -> Runner:
    """Build the runner that the config names.

    Args:
        cfg (Config): The config of the run.
        verbose (bool): Whether the console shows all that the log file has, rather than
            what is not in :data:`LOG_FILE_ONLY`.

    Returns:
        Runner: The runner.
    """
    kind = cfg.get('runner_type', 'Runner')
    kind = RUNNERS.get(kind) if isinstance(kind, str) else kind
    if not verbose:
        kind = type(kind.__name__, (_QuietConsole, kind), {})
    return kind.from_cfg(cfg)


class _QuietConsole:
    """A runner whose logger shows on the console what a person needs."""

    def build_logger(self, *args, **kwargs) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not _writes_file(handler):
                handler.addFilter(_is_for_console)
        logger.info('Log file, with environment and config: %s', logger.log_file)
        return logger


def _writes_file(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.FileHandler)


def _is_for_console(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(LOG_FILE_ONLY)


def _print_meaningful(*values: Any, **kwargs) -> None:
    """Take the place of ``print``."""
    if not str(values[0] if values else '').startswith(MEANINGLESS_LINES):
        builtins.print(*values, **kwargs)


def _print_to_log_file(*values: Any, **kwargs) -> None:
    """Take the place of ``print``."""
    if not has_logger():  # there is no log file yet
        return
    logger = MMLogger.get_current_instance()
    text = ' '.join(map(str, values)).strip('\n')
    record = logger.makeRecord(logger.name, logging.INFO, '', 0, text, (), None)
    for handler in filter(_writes_file, logger.handlers):
        handler.handle(record)

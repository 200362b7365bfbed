# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What a run shows on the console; its log file has everything.

Messages of other packages that tell a user nothing are left out. They are listed here
by their words, so a new message is always shown.
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

#: Beginnings of log records that go to the log file alone.
LOG_FILE_ONLY = (
    # MMEngine: environment, config, hooks, rate of every parameter, removed files.
    '\n' + '-' * 60 + '\nSystem environment:',
    'Config:\n',
    'Hooks will be executed in the following order:',
    'paramwise_options -- ',
    'Exp name: ',
    'The previous best checkpoint ',
    # SyncBN is BatchNorm in one process.
    'Distributed training is not used, all SyncBatchNorm',
    # MMEngine itself calls what it deprecates.
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
    # Metrics that name their values themselves, or that write predictions.
    'The prefix is not set in metric class',
    # The same numbers follow with their names.
    'bbox_mAP_copypaste: ',
    'segm_mAP_copypaste: ',
)
#: Patterns of warnings that tell nothing about a run.
MEANINGLESS_WARNINGS = (
    # An optional package that none of our configs uses.
    'faster_coco_eval is not installed',
    # The recipe's loss averages over ignored pixels too, as mmseg's does by default.
    'Default ``avg_non_ignore`` is False',
    # mmseg draws nothing unless --show-dir asks for it.
    'The draw is False, it means that the hook for visualization',
    # mmseg's test-time augmentation gives label maps without their first axis.
    'The shape of value will convert from',
    # MMEngine draws a box that ends at the edge of its picture.
    'Warning: The (bbox|polygon|text) is out of bounds',
)
#: Beginnings of lines that MMEngine prints: about an optional package of mmdet, and
#: what it also logs as "Load checkpoint from".
MEANINGLESS_LINES = ('Could not import OneDL', 'Loads checkpoint by ')


def quiet(scope: Optional[str] = None) -> None:
    """Leave out messages that tell a user nothing, in this process and its workers.

    Call this function before the toolbox is imported.

    Args:
        scope (str, optional): The toolbox of a run. With mmdet, the output of
            pycocotools goes to the log file. Defaults to None.
    """
    for message in MEANINGLESS_WARNINGS:
        warnings.filterwarnings('ignore', message)
    replace_print('mmengine.logging.logger', _print_meaningful)
    if scope == 'mmdet' and find_spec('pycocotools'):
        for name in ('pycocotools.coco', 'pycocotools.cocoeval'):
            replace_print(name, _print_to_log_file)


def build_runner(cfg: Config, verbose: bool) -> Runner:
    """Build the runner that the config names.

    Args:
        cfg (Config): The config of the run.
        verbose (bool): Whether the console shows everything that the log file has.
            False leaves out :data:`LOG_FILE_ONLY`.
    """
    kind: Any = cfg.get('runner_type', 'Runner')
    kind = RUNNERS.get(kind) if isinstance(kind, str) else kind
    if verbose:
        return kind.from_cfg(cfg)

    class QuietRunner(kind):
        def build_logger(self, *args, **kwargs) -> MMLogger:
            logger = super().build_logger(*args, **kwargs)
            for handler in logger.handlers:
                if not isinstance(handler, logging.FileHandler):
                    handler.addFilter(_is_for_console)
            logger.info('Log file, with environment and config: %s', logger.log_file)
            return logger

    QuietRunner.__name__ = kind.__name__
    return QuietRunner.from_cfg(cfg)


def _is_for_console(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(LOG_FILE_ONLY)


def _print_meaningful(*values: Any, **kwargs) -> None:
    """Replace ``print``, without :data:`MEANINGLESS_LINES`."""
    if not str(values[0] if values else '').startswith(MEANINGLESS_LINES):
        builtins.print(*values, **kwargs)


def _print_to_log_file(*values: Any, **kwargs) -> None:
    """Replace ``print``; prints nothing if there is no log file yet."""
    if not has_logger():
        return
    logger = MMLogger.get_current_instance()
    text = ' '.join(map(str, values)).strip('\n')
    record = logger.makeRecord(logger.name, logging.INFO, '', 0, text, (), None)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Private names of the OpenMMLab packages.

"Both" are mmengine 0.10.7 and onedl-mmengine 0.10.12, and the toolboxes that go with
them: see :mod:`mlla_mm.compat.versions`.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import Any, Dict, Optional

from mmengine.dist import master_only
from mmengine.hooks import CheckpointHook
from mmengine.logging import MMLogger
from mmengine.model.weight_init import update_init_info
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from yapf.yapflib import yapf_api


def checkpoint_of(runner) -> Optional[str]:
    """The checkpoint that a runner starts from or resumes, if it was named. Both."""
    return runner._load_from


def is_resumed(runner) -> bool:
    """Whether a runner goes on with another run. Both."""
    return bool(runner._resume)


def batches_of_update(wrapper: OptimWrapper) -> int:
    """Batches of an update, as the optimiser wrapper counts. Both."""
    return wrapper._accumulative_counts


def count_in_micro_batches(
    wrapper: OptimWrapper, micro_batches: int, updates: int, max_updates: int
) -> None:
    """Let an optimiser wrapper make an update of so many batches. Both.

    Args:
        wrapper (OptimWrapper): The wrapper.
        micro_batches (int): Batches of an update.
        updates (int): Updates that were made.
        max_updates (int): Updates of the whole run.
    """
    wrapper._accumulative_counts = micro_batches
    # It looks through the module for BatchNorm, to warn of what is done right here.
    module = nn.Identity()
    wrapper.initialize_count_status(
        module, updates * micro_batches, max_updates * micro_batches
    )


class TrainLoopCounters:
    """Names for what MMEngine's two training loops count with. Both."""

    def count_update(self) -> None:
        """One more update is made."""
        self._iter += 1

    def count_epoch(self) -> None:
        """One more epoch is over."""
        self._epoch += 1

    def update_val_interval(self) -> None:
        """Follow ``dynamic_intervals``."""
        self._decide_current_val_interval()

    def load_from_pass(self, number: int) -> None:
        """Begin to load anew, in a pass over the data counted from 0.

        mmengine 0.10.7 has already begun, from the start of the first pass.
        """
        self.dataloader_iterator = type(self.dataloader_iterator)(self.dataloader)
        self.dataloader_iterator._epoch = number


def note_init_info(module: nn.Module, text: str) -> None:
    """Note how a module's parameters were initialised, where MMEngine asks. Both."""
    if hasattr(module, '_params_init_info'):
        update_init_info(module, init_info=text)


class CheckpointHookSteps(CheckpointHook):
    """MMEngine's hook with names for its steps, for subclasses. Both."""

    def saving(self) -> AbstractContextManager:
        """What surrounds the saving of a checkpoint."""
        raise NotImplementedError

    def saved_usual(self, runner) -> None:
        """A checkpoint of an epoch or iteration was saved, and old ones removed."""

    def publishes(self, path: Optional[str]) -> bool:
        """Whether a file is to be published at the end."""
        raise NotImplementedError

    def _save_checkpoint_with_step(self, runner, step, meta) -> None:
        with self.saving():
            super()._save_checkpoint_with_step(runner, step, meta)
        self.saved_usual(runner)

    def _save_best_checkpoint(self, runner, metrics) -> None:
        with self.saving():
            super()._save_best_checkpoint(runner, metrics)

    @master_only
    def _publish_model(self, runner, ckpt_path: Optional[str]) -> None:
        if self.publishes(ckpt_path):
            super()._publish_model(runner, ckpt_path)


@contextmanager
def acting_as(rank: int, world_size: int) -> Iterator[None]:
    """Let samplers be built for another process than this one. Both.

    They all ask ``get_dist_info`` when they are built, and take no rank as argument.
    """
    utils = import_module('mmengine.dist.utils')
    own = utils.get_rank, utils.get_world_size
    utils.get_rank = lambda group=None: rank
    utils.get_world_size = lambda group=None: world_size
    try:
        yield
    finally:
        utils.get_rank, utils.get_world_size = own


def lay_out_configs_once() -> None:
    """Let YAPF lay out a config's text once in this process.

    It takes a second or more. MMEngine writes the text in four places when a run
    starts, and in every checkpoint. mmengine 0.10.7 imports YAPF's function once, the
    fork whenever it calls it.
    """
    config = import_module('mmengine.config.config')
    owner = config if hasattr(config, 'FormatCode') else yapf_api
    lay_out = owner.FormatCode
    if hasattr(lay_out, '__wrapped__'):
        return
    known: Dict[str, tuple] = {}

    @functools.wraps(lay_out)
    def format_code(text: str, **options) -> tuple:
        if text not in known:
            known[text] = lay_out(text, **options)
        return known[text]

    owner.FormatCode = format_code


def replace_print(module: str, print_: Callable[..., None]) -> None:
    """Let what a module prints go elsewhere.

    MMEngine's ``logger`` (both) and pycocotools (2.0) print what can be had no other
    way.
    """
    import_module(module).print = print_


def has_logger() -> bool:
    """Whether MMEngine has made a logger. Both."""
    return bool(MMLogger._instance_dict)


def classification_losses(head: Any, logits: Tensor, data_samples: list) -> dict:
    """Losses of an mmpretrain head (1.2.0, 1.3.6) for logits that are there."""
    return head._get_loss(logits, data_samples)

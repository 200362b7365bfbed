# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Training loops in which an iteration is an optimiser update of seeded batches."""

import logging
from itertools import count
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .hooks.preemption import shield_workers
from .seeding import UPDATE, seed_generators

_SEEDED = {
    'EpochBasedTrainLoop': 'SeededEpochBasedTrainLoop',
    'IterBasedTrainLoop': 'SeededIterBasedTrainLoop',
}


class _Updating:
    """What the two loops share: an iteration is an update of seeded micro-batches."""

    def __init__(self, *args, micro_batches: int = 1, **kwargs) -> None:
        # Before the data loader: MMEngine 0.10.7 may start its workers with it.
        shield_workers()
        super().__init__(*args, **kwargs)
        self.micro_batches = micro_batches

    def _begin(self) -> None:
        """What comes before the first update, a validation that was cut off as well."""
        runner = self.runner
        self._count_micro_batches()
        runner.call_hook('before_train')
        due = runner.message_hub.pop_info('validation_due', False)
        if due and runner.val_loop is not None:
            runner.val_loop.run()

    def _count_micro_batches(self) -> None:
        """Count in micro-batches inside the optimiser wrapper alone.

        MMEngine has set its counters in iterations, which are updates here.
        """
        if self.micro_batches == 1:
            return
        wrapper = self.runner.optim_wrapper
        if not isinstance(wrapper, OptimWrapper):
            raise ValueError(
                'Accumulating micro-batches needs one optimiser, but optim_wrapper is '
                f'a {type(wrapper).__name__}. Train on as many processes as the recipe.'
            )
        wrapper._accumulative_counts = self.micro_batches
        # The module is looked through for BatchNorm, to warn of what is done
        # right here; hence one without.
        wrapper.initialize_count_status(
            nn.Identity(),
            self._iter * self.micro_batches,
            self._max_iters * self.micro_batches,
        )

    def _update(self, batch_idx: int, micro_batches: List[Any]) -> None:
        """One iteration: forward and backward of every micro-batch, then one step."""
        runner = self.runner
        # Hooks expect a batch where there is only one.
        data = micro_batches if len(micro_batches) > 1 else micro_batches[0]
        runner.call_hook('before_train_iter', batch_idx=batch_idx, data_batch=data)
        seed = self.dataloader.batch_sampler.sampler.seed
        outputs = train_step(
            runner.model, micro_batches, runner.optim_wrapper, (seed, self._iter)
        )
        runner.call_hook(
            'after_train_iter', batch_idx=batch_idx, data_batch=data, outputs=outputs
        )
        self._iter += 1


@LOOPS.register_module()
class SeededEpochBasedTrainLoop(_Updating, EpochBasedTrainLoop):
    """MMEngine's loop over epochs, for the data loaders of :func:`use_seeded_loop`.

    An iteration is an optimiser update of one or several micro-batches, so everything
    that counts iterations (schedulers, hooks, logs, checkpoints) counts updates. Its
    random numbers depend on its number alone. A run that resumes from a checkpoint of
    the middle of an epoch goes on behind the images that were seen, without loading
    those.

    Args:
        micro_batches (int): Number of micro-batches of an update. Defaults to 1.
        *args, **kwargs: As :class:`mmengine.runner.EpochBasedTrainLoop` takes them.
    """

    def run(self) -> nn.Module:
        self._begin()
        runner = self.runner
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._decide_current_val_interval()
            if self._validates_now():
                runner.val_loop.run()
        runner.call_hook('after_train')
        return runner.model

    def run_epoch(self) -> None:
        runner = self.runner
        seen = self._find_beginning()
        runner.call_hook('before_train_epoch')
        runner.model.train()
        self.dataloader.batch_sampler.skip_in_pass(seen)
        for idx, data_batch in enumerate(self.dataloader, start=seen):
            self.run_iter(idx, data_batch)
        runner.call_hook('after_train_epoch')
        self._epoch += 1

    def _find_beginning(self) -> int:
        """How many updates of this epoch a resumed run has made; written down too."""
        hub = self.runner.message_hub
        length = len(self.dataloader)
        begun = hub.get_info('epoch_begun')
        if begun is not None and begun['epoch'] == self._epoch:
            if begun['updates'] == length:
                return self._iter - begun['iter']
            print_log(
                f'Epoch {self._epoch + 1} begins anew: it has {length} updates; it had '
                f'{begun["updates"]} in the run that is resumed.',
                logger='current',
                level=logging.WARNING,
            )
        begun = dict(epoch=self._epoch, iter=self._iter, updates=length)
        hub.update_info('epoch_begun', begun)
        return 0

    def _validates_now(self) -> bool:
        if self.runner.val_loop is None or self._epoch < self.val_begin:
            return False
        return self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs

    def run_iter(self, idx: int, data_batch: List[Any]) -> None:
        self._update(idx, data_batch)


@LOOPS.register_module()
class SeededIterBasedTrainLoop(_Updating, IterBasedTrainLoop):
    """MMEngine's loop over iterations, for the data loaders of :func:`use_seeded_loop`.

    An iteration is as in :class:`SeededEpochBasedTrainLoop`. A resumed run goes on
    behind the images that were seen, without loading those.

    Args:
        micro_batches (int): Number of micro-batches of an update. Defaults to 1.
        *args, **kwargs: As :class:`mmengine.runner.IterBasedTrainLoop` takes them.
    """

    def run(self) -> nn.Module:
        self._begin()
        runner = self.runner
        runner.call_hook('before_train_epoch')
        if self._iter > 0:
            self._go_on_behind_seen_images()
        while self._iter < self._max_iters and not self.stop_training:
            runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            self._decide_current_val_interval()
            if self._validates_now():
                runner.val_loop.run()
        runner.call_hook('after_train_epoch')
        runner.call_hook('after_train')
        return runner.model

    def run_iter(self, data_batch: List[Any]) -> None:
        self._update(self._iter, data_batch)

    def _go_on_behind_seen_images(self) -> None:
        passes = self.dataloader.batch_sampler.skip(self._iter)
        # MMEngine 0.10.7 has already begun to load from the start.
        self.dataloader_iterator = type(self.dataloader_iterator)(self.dataloader)
        self.dataloader_iterator._epoch = passes

    def _validates_now(self) -> bool:
        if self.runner.val_loop is None or self._iter < self.val_begin:
            return False
        return self._iter % self.val_interval == 0 or self._iter == self._max_iters


def use_seeded_loop(cfg: Config, micro_batches: Optional[int] = None) -> bool:
    """Train with one of the loops of this module, and the data loader that it needs.

    Such a run also saves a checkpoint when it is told to stop: :class:`PreemptionHook`.

    Args:
        cfg (Config): The config of a training run; changed in place.
        micro_batches (int, optional): Number of micro-batches of an update. None leaves
            the config's, which is 1 if there is none. Defaults to None.

    The config's ``skip_corrupt_images`` says what becomes of images that cannot be
    read: see :class:`SeededDataset`.

    Returns:
        bool: Whether that was possible. It is not with a training loop other than
        MMEngine's two; such a config is left as it is.

    Raises:
        ValueError: If it is not possible, but ``skip_corrupt_images`` needs it.
    """
    loop, loader = cfg.train_cfg, cfg.train_dataloader
    by_epoch = loop.pop('by_epoch', True)
    kind = loop.get('type', 'EpochBasedTrainLoop' if by_epoch else 'IterBasedTrainLoop')
    loop['type'] = _SEEDED.get(kind, kind)
    if loop['type'] not in _SEEDED.values():
        if cfg.get('skip_corrupt_images'):
            raise ValueError(
                f"skip_corrupt_images needs one of {list(_SEEDED)}, got '{kind}'."
            )
        return False
    if kind in _SEEDED:
        loop['micro_batches'] = 1
        _share_samples(loader, cfg.get('skip_corrupt_images', False))
        hooks = [*(cfg.get('custom_hooks') or []), dict(type='PreemptionHook')]
        if cfg.get('skip_corrupt_images'):
            hooks.append(dict(type='SkippedImagesHook'))
        cfg.custom_hooks = hooks
    if micro_batches is not None:
        if 'num_batch_per_epoch' in loader:
            # MMEngine multiplies it by the processes that there are.
            updates = loader['num_batch_per_epoch'] // loop['micro_batches']
            loader['num_batch_per_epoch'] = updates * micro_batches
        loop['micro_batches'] = micro_batches
        loader['sampler']['micro_batches'] = micro_batches
        loader['collate_fn']['micro_batches'] = micro_batches
    return True


def _share_samples(loader: dict, skip_corrupt_images: bool) -> None:
    """Let a data loader yield micro-batches, and seed the augmentations."""
    batch_sampler = dict(type='SharedBatchSampler')
    if loader.get('batch_sampler'):
        batch_sampler['batch_sampler'] = loader['batch_sampler']
    else:
        batch_sampler['drop_last'] = loader.pop('drop_last', False)
    loader['batch_sampler'] = batch_sampler
    loader['sampler'] = dict(
        type='SharedSampler', sampler=loader['sampler'], micro_batches=1
    )
    loader['collate_fn'] = dict(
        type='collate_micro_batches',
        micro_batches=1,
        collate_fn=loader.get('collate_fn', dict(type='pseudo_collate')),
    )
    loader['dataset'] = dict(
        type='SeededDataset',
        dataset=loader['dataset'],
        skip_corrupt_images=skip_corrupt_images,
    )


def train_step(
    model: nn.Module,
    micro_batches: Sequence[Any],
    optim_wrapper: OptimWrapper,
    key: Tuple[int, int],
) -> Dict[str, Tensor]:
    """Make one optimiser update of several micro-batches.

    The gradient is the mean of theirs. Running statistics of BatchNorm take in the mean
    of theirs as well, once: as if each had been seen by a process of its own and the
    processes' statistics then averaged. So are the random numbers those of as many
    processes.

    Args:
        model (nn.Module): The model, or its wrapper, with a ``train_step`` of its own.
        micro_batches (Sequence): Batches of equal size, as the model takes them.
        optim_wrapper (OptimWrapper): Makes a step after as many batches.
        key (tuple[int]): Seed of the run, and number of the update.

    Returns:
        Dict[str, Tensor]: Means of what the model's ``train_step`` returns.
    """
    if len(micro_batches) == 1:
        seed_generators(UPDATE, *key, get_rank())
        return model.train_step(micro_batches[0], optim_wrapper=optim_wrapper)
    means, counters = _running_statistics(model)
    start = [value.clone() for value in means + counters]
    sums = [torch.zeros_like(value) for value in means]
    logs = []
    for process, batch in zip(count(get_rank() * len(micro_batches)), micro_batches):
        for value, first in zip(means + counters, start):
            value.copy_(first)
        seed_generators(UPDATE, *key, process)
        logs.append(model.train_step(batch, optim_wrapper=optim_wrapper))
        for total, value in zip(sums, means):
            total += value
    for value, total in zip(means, sums):
        value.copy_(total / len(micro_batches))
    return {
        key: torch.stack([log[key].detach() for log in logs]).mean() for key in logs[0]
    }


def _running_statistics(model: nn.Module) -> Tuple[List[Tensor], List[Tensor]]:
    """Means and variances, and the counters, of the BatchNorm layers in training."""
    layers = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.training
        and module.running_mean is not None
    ]
    means = [x for layer in layers for x in (layer.running_mean, layer.running_var)]
    return means, [layer.num_batches_tracked for layer in layers]

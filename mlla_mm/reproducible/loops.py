# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The loops that our configs name in ``train_cfg``, ``val_cfg`` and ``test_cfg``.

An iteration of training is an optimiser update, and its random numbers are seeded. An
evaluation names the image that it cannot read. Each loop takes the config of a data
loader, as MMEngine's loops do, and wraps the data set and the sampler in it.
"""

import logging
import signal
from itertools import count
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from mmengine.dist import get_rank
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import LOOPS
from mmengine.runner import (
    BaseLoop,
    EpochBasedTrainLoop,
    IterBasedTrainLoop,
    TestLoop,
    ValLoop,
)
from torch import Tensor, nn

from ..compat.openmmlab import (
    TrainLoopCounters,
    copy_without_waiting,
    count_in_micro_batches,
)
from ..compat.pytorch import BatchNorm
from ..datasets.corrupt_images import SkippedImagesHook
from .preemption import Preempted, handle_sigterm, shield_workers
from .running_statistics import RULES, make_alike
from .seeding import UPDATE, seed_generators
from .update_status import UpdateStatus, read_update


class SeededTrainLoop(TrainLoopCounters, BaseLoop):
    """What both training loops share: an iteration updates with seeded micro-batches.

    Args:
        runner (Runner): The runner.
        dataloader (dict): Config of the data loader, as MMEngine's loops take it.
        micro_batches (int): Number of micro-batches of an update. Defaults to 1.
        skip_corrupt_images (bool): True replaces an image that cannot be read by
            another one, and logs how many were replaced. False ends the run with an
            error that names the file. Defaults to False.
        running_statistics (str): Whose running statistics of BatchNorm count. With
            ``'mean'`` every process has its own, and their mean is saved and evaluated.
            With ``'first'`` those of the first process (of the recipe's, if there are
            micro-batches) are everybody's after every update, as with PyTorch's
            ``DistributedDataParallel(broadcast_buffers=True)``: they are saved,
            evaluated and averaged, and the others' are lost. Defaults to ``'mean'``.
        **kwargs: Further arguments of MMEngine's loop.

    Raises:
        ValueError: If ``dataloader`` is not a config, because its samples could not be
            seeded. If ``micro_batches`` is not positive, or ``running_statistics``
            unknown.
    """

    #: Tells :class:`PreemptionHook` that a validation may be interrupted.
    repeats_validation = True
    #: What all processes know of the last update. None if that is long ago.
    status: Optional[UpdateStatus] = None

    def __init__(
        self,
        runner,
        dataloader: dict,
        micro_batches: int = 1,
        skip_corrupt_images: bool = False,
        running_statistics: str = 'mean',
        **kwargs,
    ) -> None:
        if not isinstance(dataloader, dict):
            raise ValueError(
                f'{type(self).__name__} needs the config of a data loader, but '
                f'train_dataloader is a {type(dataloader).__name__}. Give the config, '
                "or use one of MMEngine's loops."
            )
        if micro_batches < 1:
            raise ValueError(f'micro_batches must be positive, got {micro_batches}.')
        if running_statistics not in RULES:
            raise ValueError(
                "train_cfg.running_statistics must be 'mean' or 'first', got "
                f'{running_statistics!r}.'
            )
        # First, because mmengine 0.10.7 may start workers when it builds the loader.
        shield_workers()
        loader = _share_samples(dataloader, micro_batches, skip_corrupt_images)
        super().__init__(runner, loader, **kwargs)
        self.micro_batches = micro_batches
        self.running_statistics = running_statistics
        if skip_corrupt_images:
            runner.register_hook(SkippedImagesHook())

    def run(self) -> nn.Module:
        """Train, and return the model.

        If the resumed run was stopped in a validation, that validation comes first.
        """
        runner = self.runner
        self.status = None
        copy_without_waiting(runner.model)
        self._count_micro_batches()
        handler = signal.getsignal(signal.SIGTERM)
        try:
            runner.call_hook('before_train')
            due = runner.message_hub.pop_info('validation_due', False)
            if due and runner.val_loop is not None:
                runner.val_loop.run()
            self._train()
            runner.call_hook('after_train')
        except Preempted:
            raise  # The program ends now, and ignores further signals.
        except BaseException:
            # The program may go on, so SIGTERM must end it as before.
            handle_sigterm(handler)
            raise
        return runner.model

    def _count_micro_batches(self) -> None:
        """Let the optimiser wrapper count in micro-batches.

        MMEngine has set its counters in iterations. Here an iteration is an update.
        """
        if self.micro_batches == 1:
            return
        wrapper = self.runner.optim_wrapper
        if not isinstance(wrapper, OptimWrapper):
            raise ValueError(
                'Accumulating micro-batches needs one optimiser, but optim_wrapper is '
                f'a {type(wrapper).__name__}. Train on as many processes as the recipe.'
            )
        count_in_micro_batches(wrapper, self.micro_batches, self.iter, self.max_iters)

    def _validate_if_due(self, done: int, total: int) -> None:
        """Validate, if it is time to after ``done`` of all epochs or iterations."""
        self.update_val_interval()
        if self.runner.val_loop is None or done < self.val_begin:
            return
        if done % self.val_interval == 0 or done == total:
            self.runner.val_loop.run()
            self.status = None

    def _update(self, batch_idx: int, micro_batches: List[Any]) -> None:
        """One iteration: forward and backward of every micro-batch, then one step."""
        runner = self.runner
        # Hooks expect a batch, not a list of one batch.
        data = micro_batches if len(micro_batches) > 1 else micro_batches[0]
        runner.call_hook('before_train_iter', batch_idx=batch_idx, data_batch=data)
        seed = self.dataloader.batch_sampler.sampler.seed
        first_alone = self.running_statistics == 'first'
        logs = train_step(
            runner.model,
            micro_batches,
            runner.optim_wrapper,
            (seed, self.iter),
            first_alone,
        )
        if first_alone:
            # Before hooks that average or save them.
            make_alike(runner, runner.model.buffers())
        self.status = read_update(logs, runner.optim_wrapper, self._asks_to_stop())
        runner.call_hook(
            'after_train_iter',
            batch_idx=batch_idx,
            data_batch=data,
            outputs=self.status.logs,
        )
        self.count_update()

    def _asks_to_stop(self) -> bool:
        """Whether a hook of this process asks all processes to stop."""
        hooks = (hook for hook in self.runner.hooks if hasattr(hook, 'asks_to_stop'))
        return any(hook.asks_to_stop() for hook in hooks)


@LOOPS.register_module()
class SeededEpochBasedTrainLoop(SeededTrainLoop, EpochBasedTrainLoop):
    """MMEngine's loop over epochs, but a run can be repeated, split and resumed.

    An iteration is an optimiser update of one or several micro-batches, so everything
    that counts iterations (schedulers, hooks, logs, checkpoints) counts updates. The
    random numbers of an update depend on its number alone. A checkpoint may be of the
    middle of an epoch: the resumed run then goes on with the images that were not seen
    yet, and does not load the others.

    Args: Those of :class:`SeededTrainLoop` and
        :class:`mmengine.runner.EpochBasedTrainLoop`.

    Raises:
        ValueError: If an epoch has no update.
    """

    def __init__(self, runner, dataloader: dict, *args, **kwargs) -> None:
        super().__init__(runner, dataloader, *args, **kwargs)
        if self.max_iters == 0 and self.max_epochs:
            raise ValueError(
                f'an epoch has no update: the {len(self.dataloader.dataset)} images of '
                'training do not fill the batches of all processes. Set a smaller '
                'train_dataloader.batch_size, or train_dataloader.drop_last=False.'
            )

    def _train(self) -> None:
        while self.epoch < self.max_epochs and not self.stop_training:
            self.run_epoch()
            self._validate_if_due(self.epoch, self.max_epochs)

    def run_epoch(self) -> None:
        runner = self.runner
        self.status = None
        seen = self._find_beginning()
        runner.call_hook('before_train_epoch')
        runner.model.train()
        self.dataloader.batch_sampler.skip_in_pass(seen)
        for idx, data_batch in enumerate(self.dataloader, start=seen):
            self.run_iter(idx, data_batch)
        runner.call_hook('after_train_epoch')
        self.count_epoch()

    def _find_beginning(self) -> int:
        """Return how many updates of this epoch were made, and note where it began."""
        hub = self.runner.message_hub
        length = len(self.dataloader)
        begun = hub.get_info('epoch_begun')
        if begun is not None and begun['epoch'] == self.epoch:
            if begun['updates'] == length:
                return self.iter - begun['iter']
            print_log(
                f'Epoch {self.epoch + 1} begins anew: it has {length} updates, but '
                f'{begun["updates"]} in the run that is resumed.',
                logger='current',
                level=logging.WARNING,
            )
        begun = dict(epoch=self.epoch, iter=self.iter, updates=length)
        hub.update_info('epoch_begun', begun)
        return 0

    def run_iter(self, idx: int, data_batch: List[Any]) -> None:
        self._update(idx, data_batch)


@LOOPS.register_module()
class SeededIterBasedTrainLoop(SeededTrainLoop, IterBasedTrainLoop):
    """MMEngine's loop over iterations, but a run can be repeated, split and resumed.

    An iteration is as in :class:`SeededEpochBasedTrainLoop`. A resumed run goes on with
    the images that were not seen yet, and does not load the others.

    Args: Those of :class:`SeededTrainLoop` and
        :class:`mmengine.runner.IterBasedTrainLoop`.
    """

    def _train(self) -> None:
        runner = self.runner
        runner.call_hook('before_train_epoch')
        if self.iter > 0:
            # Go on behind the images that were seen.
            self.load_from_pass(self.dataloader.batch_sampler.skip(self.iter))
        while self.iter < self.max_iters and not self.stop_training:
            runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            self._validate_if_due(self.iter, self.max_iters)
        runner.call_hook('after_train_epoch')

    def run_iter(self, data_batch: List[Any]) -> None:
        self._update(self.iter, data_batch)


def is_seeded(train_cfg: dict) -> bool:
    """Whether a config's training loop is one of this module, or derived from one."""
    kind = train_cfg.get('type')
    known = LOOPS.get(kind) if isinstance(kind, str) else kind
    return isinstance(known, type) and issubclass(known, SeededTrainLoop)


def require_seeded(train_cfg: dict, what: str) -> None:
    """Refuse a setting that only the loops of this module support.

    Args:
        train_cfg (dict): The config of the training loop.
        what (str): The setting, for the message.

    Raises:
        ValueError: If the config names another loop; the message has the line to write.
    """
    if is_seeded(train_cfg):
        return
    ours = 'Epoch' if 'max_epochs' in train_cfg else 'Iter'
    raise ValueError(
        f'{what} needs a training loop of mlla_mm, but train_cfg.type is '
        f'{train_cfg.get("type")!r}. Put this into the config: '
        f"train_cfg = dict(type='Seeded{ours}BasedTrainLoop')"
    )


class _NamingCorruptImages(BaseLoop):
    """What both loops of evaluation share: they wrap a :class:`CheckedDataset`."""

    def __init__(self, runner, dataloader, *args, **kwargs) -> None:
        if isinstance(dataloader, dict):
            dataset = dict(type='CheckedDataset', dataset=dataloader['dataset'])
            dataloader = {**_pinned(dataloader), 'dataset': dataset}
        super().__init__(runner, dataloader, *args, **kwargs)

    def run(self) -> dict:
        """Evaluate, and return the metrics."""
        copy_without_waiting(self.runner.model)
        return super().run()


@LOOPS.register_module()
class CheckedValLoop(_NamingCorruptImages, ValLoop):
    """MMEngine's loop, but an image that cannot be read is an error that names it.

    No image is skipped, because the metrics would then be those of another data set.

    Args: Those of :class:`mmengine.runner.ValLoop`.
    """


@LOOPS.register_module()
class CheckedTestLoop(_NamingCorruptImages, TestLoop):
    """The same as :class:`CheckedValLoop`, for tests.

    Args: Those of :class:`mmengine.runner.TestLoop`.
    """


def _pinned(loader: dict) -> dict:
    """A copy of a data loader's config that pins memory if there is a GPU.

    Pinned memory is copied to the GPU while it works. ``pin_memory=False`` in a config
    forbids it.
    """
    return {'pin_memory': torch.cuda.is_available(), **loader}


def _share_samples(loader: dict, micro_batches: int, skip_corrupt_images: bool) -> dict:
    """Return a data loader's config that gives micro-batches of seeded samples."""
    loader = _pinned(loader)
    if not isinstance(loader.get('sampler'), dict):
        raise ValueError(
            'train_dataloader.sampler must be a config, such as '
            "dict(type='DefaultSampler', shuffle=True), got "
            f'{loader.get("sampler")!r}.'
        )
    collate = loader.get('collate_fn') or dict(type='pseudo_collate')
    batch_sampler = dict(type='SharedBatchSampler')
    if loader.get('batch_sampler'):
        batch_sampler['batch_sampler'] = loader['batch_sampler']
    else:
        batch_sampler['drop_last'] = loader.pop('drop_last', False)
    loader.setdefault('batch_size', 1)  # PyTorch's default
    loader['batch_sampler'] = batch_sampler
    loader['sampler'] = dict(
        type='SharedSampler', sampler=loader['sampler'], micro_batches=micro_batches
    )
    loader['collate_fn'] = dict(
        type='collate_micro_batches',
        micro_batches=micro_batches,
        collate_fn=dict(type=collate) if callable(collate) else collate,
    )
    loader['dataset'] = dict(
        type='SeededDataset',
        dataset=loader['dataset'],
        skip_corrupt_images=skip_corrupt_images,
    )
    if loader.get('num_batch_per_epoch'):
        # MMEngine multiplies it by the number of processes alone.
        loader['num_batch_per_epoch'] *= micro_batches
    return loader


def train_step(
    model: Any,
    micro_batches: Sequence[Any],
    optim_wrapper: OptimWrapper,
    key: Tuple[int, int],
    first_alone: bool = False,
) -> Dict[str, Tensor]:
    """Make one optimiser update of several micro-batches.

    The result is as if each micro-batch had been seen by a process of its own: the
    gradient is the mean over micro-batches, BatchNorm's running statistics are updated
    once, to the mean over micro-batches, and each micro-batch has the random numbers of
    its process.

    Args:
        model (nn.Module): The model or its wrapper, with MMEngine's ``train_step``.
        micro_batches (Sequence): Batches of equal size, as the model takes them.
        optim_wrapper (OptimWrapper): Makes its step after the last micro-batch.
        key (tuple[int]): Seed of the run, and number of the update.
        first_alone (bool): Whether BatchNorm's running statistics are those of the
            first micro-batch, not the mean. Defaults to False.

    Returns:
        dict[str, Tensor]: Means over the micro-batches of the model's logs.
    """
    if len(micro_batches) == 1:
        seed_generators(UPDATE, *key, get_rank())
        return model.train_step(micro_batches[0], optim_wrapper=optim_wrapper)
    statistics = [
        buffer
        for layer in model.modules()
        if isinstance(layer, BatchNorm) and layer.training
        for buffer in layer.buffers()
    ]
    start = [value.clone() for value in statistics]
    # The others are the numbers of updates.
    means = [value for value in statistics if value.is_floating_point()]
    sums = [torch.zeros_like(value) for value in means]
    counted = 1 if first_alone else len(micro_batches)
    logs = []
    for process, batch in zip(count(get_rank() * len(micro_batches)), micro_batches):
        for value, first in zip(statistics, start):
            value.copy_(first)
        seed_generators(UPDATE, *key, process)
        logs.append(model.train_step(batch, optim_wrapper=optim_wrapper))
        if len(logs) <= counted:
            for total, value in zip(sums, means):
                total += value
    for value, total in zip(means, sums):
        value.copy_(total / counted)
    return {
        key: torch.stack([torch.as_tensor(log[key]).detach() for log in logs]).sum()
        / len(logs)
        for key in logs[0]
    }

# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from collections.abc import Mapping
from typing import Dict, List, Optional

import torch
from mmengine.hooks import Hook, RuntimeInfoHook
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import weights_to_cpu
from mmengine.runner.amp import autocast
from torch import Tensor

from ...checkpoints.fit import check_fit
from ...checkpoints.layout import EMA_KEY, find_weights
from ...checkpoints.reader import CheckpointError
from ...compat.openmmlab import batches_of_update
from ...reproducible.resume import source_of
from ...reproducible.running_statistics import make_alike
from ..ema import ModelEMA, recipe_decay
from .weights import unwrap


@HOOKS.register_module()
class MESAHook(Hook):
    """Average the weights in training, and let the average teach the model.

    - The average starts from the initial or loaded weights. It is updated after every
      optimiser step, so once per accumulated batch. It is also updated when mixed
      precision skips the step.
    - From epoch ``int(start * max_epochs)`` on, counted from 0, the average is the
      teacher of a :class:`mlla_mm.models.classifiers.MESAClassifier`.
    - After each validation of the model, the average is validated, too. Its metrics
      have the prefix ``ema_``, as in ``ema_accuracy/top1``.
    - Checkpoints hold the model's weights in ``state_dict`` and the average in
      ``state_dict_ema``, under the same names. Resuming continues both.

    Args:
        decay (float, optional): Part of the average that an update keeps. None follows
            the recipe with the total batch size B (processes x batch x accumulated
            batches): 0.9996 ** (B / 4096). Defaults to None.
        start (float): Part of the epochs that is trained without a teacher, in [0, 1].
            Defaults to 0.25.

    Attributes:
        ema (ModelEMA): The average; only after training has started.

    Raises:
        ValueError: If ``start`` is out of range.
        CheckpointError: If a run is resumed from a checkpoint whose average is missing
            or does not fit.
    """

    # After the synchronisation of buffers, before logs (BELOW_NORMAL) and checkpoints.
    priority = 'NORMAL'
    ema: ModelEMA

    def __init__(self, decay: Optional[float] = None, start: float = 0.25) -> None:
        if not 0 <= start <= 1:
            raise ValueError(f'start must be in [0, 1], got {start}.')
        self.decay = decay
        self.start = start
        self._loaded: Optional[Mapping] = None
        self._source = ''

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        self._source = source_of(runner)
        self._loaded = None
        if isinstance(checkpoint.get(EMA_KEY), Mapping):
            self._loaded = find_weights(checkpoint, self._source, ema=True)

    # Not in before_run: the weights are initialised or loaded after it.
    def before_train(self, runner) -> None:
        model = unwrap(runner.model)
        if not hasattr(model, 'set_teacher'):
            raise ValueError(
                'MESAHook teaches a MESAClassifier, but the model is a '
                f'{type(model).__name__}. Change model.type or remove the hook.'
            )
        self.ema = ModelEMA(model, self._get_decay(runner))
        if runner.iter > 0:
            if self._loaded is None:
                raise CheckpointError(
                    f'{self._source} cannot be resumed: it has no averaged weights '
                    f"('{EMA_KEY}'), as it was trained without MESAHook. Start from "
                    'its weights with load_from instead, or set default_hooks.mesa='
                    "dict(_delete_=True, type='NoHook')."
                )
            check_fit(self.ema.module.state_dict(), self._loaded, self._source)
            self.ema.module.load_state_dict(self._loaded)
        self._loaded = None

    def before_train_epoch(self, runner) -> None:
        if runner.epoch >= int(self.start * runner.max_epochs):
            unwrap(runner.model).set_teacher(self.ema.module)

    def after_train_iter(
        self,
        runner,
        batch_idx: int,
        data_batch: Optional[dict] = None,
        outputs: Optional[dict] = None,
    ) -> None:
        # This is true right after the iteration that made a step.
        if runner.optim_wrapper.should_update():
            self.ema.update(unwrap(runner.model))

    def after_train_epoch(self, runner) -> None:
        # BatchNorm statistics differ between processes, and so do their averages.
        make_alike(runner, self.ema.module.buffers())

    def after_val_epoch(
        self, runner, metrics: Optional[Dict[str, float]] = None
    ) -> None:
        if not hasattr(self, 'ema'):  # validation without training
            return
        own = {f'ema_{key}': value for key, value in self._evaluate(runner).items()}
        if metrics is not None:  # for the choice of the best checkpoint
            metrics.update(own)
        RuntimeInfoHook().after_val_epoch(runner, own)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        checkpoint[EMA_KEY] = weights_to_cpu(self.ema.module.state_dict())

    def after_train(self, runner) -> None:
        unwrap(runner.model).set_teacher(None)

    def own_buffers(self) -> List[Tensor]:
        """The average's buffers, which :class:`PreemptionHook` saves by process."""
        return list(self.ema.module.buffers())

    def _get_decay(self, runner) -> float:
        if self.decay is not None:
            return self.decay
        total_batch_size = (
            runner.world_size
            * runner.train_dataloader.batch_sampler.batch_size
            * batches_of_update(runner.optim_wrapper)
        )
        decay = recipe_decay(total_batch_size)
        print_log(
            f'EMA decay {decay:.8f} for a total batch size of {total_batch_size}.',
            logger='current',
        )
        return decay

    @torch.no_grad()
    def _evaluate(self, runner) -> Dict[str, float]:
        model: BaseModel = self.ema.module
        loop = runner.val_loop
        for data_batch in loop.dataloader:
            with autocast(enabled=loop.fp16):
                outputs = model.val_step(data_batch)
            loop.evaluator.process(data_samples=outputs, data_batch=data_batch)
        return loop.evaluator.evaluate(len(loop.dataloader.dataset))
